// Encoding and decoding of tokens. Compiled without fused multiply-add: bytes are then the reference's.
#include "cuda/heads/encode.h"
#include "cuda/heads/gather.h"

namespace kvcompress::cuda {
namespace {

constexpr int kAppendTokens = 4, kPageTokens = 16;

template <int TOKENS, bool WHOLE>
int start(const EncodeArgs& args, int64_t blocks, void* stream) {
    const int rank = args.pages.k.rank > args.pages.v.rank ? args.pages.k.rank : args.pages.v.rank;
    const int64_t bytes = 4 * TOKENS * (args.head_dim + rank) + (WHOLE ? args.pages.chunk_bytes : 0);
    const Grid grid{static_cast<int>(blocks), args.pages.num_heads, 2};
    return rank > kUsualRank ? launch<encode<TOKENS, WHOLE, kMaxRank>>(grid, kEncodeThreads, bytes, stream, args)
                             : launch<encode<TOKENS, WHOLE, kUsualRank>>(grid, kEncodeThreads, bytes, stream, args);
}

}  // namespace

int start_append(const EncodeArgs& args, void* stream) {
    return start<kAppendTokens, false>(args, (args.num_tokens + kAppendTokens - 1) / kAppendTokens, stream);
}

int start_compress(const EncodeArgs& args, void* stream) {
    return start<kPageTokens, true>(args, args.num_tokens / kChunk, stream);
}

int start_gather(const GatherArgs& args, void* stream) {
    const int chunks = (args.num_tokens + kChunk - 1) / kChunk;
    return launch<gather>({chunks, args.pages.num_heads, 2}, kEncodeThreads, 0, stream, args);
}

}  // namespace kvcompress::cuda
