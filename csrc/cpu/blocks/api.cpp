// The C interface of the form `blocks`.
#include "cpu/core/schedule.h"

namespace kvcompress::cpu {
namespace {

bool covered(const kvc_block_side& side, const kvc_block_pages& pages) {
    const bool codes = (side.bits == 2 || side.bits == 4 || side.bits == 8) && side.rank > 0 && side.rank % 8 == 0 && side.rank <= pages.head_dim;
    const bool rest = side.low_rank >= 0 && side.low_rank <= kMaxLowRank && side.outliers >= 0 && side.outliers <= pages.block * side.rank &&
                      side.outliers % 8 == 0 && side.nbytes > 0;
    return codes && rest && pages.block * side.rank <= 1 << 16;
}

bool covered(const kvc_block_pages& pages) {
    if (pages.head_dim <= 0 || pages.head_dim > kMaxHeadDim || pages.head_dim % 8 || pages.num_kv_heads <= 0) return false;
    if (pages.block <= 0 || pages.block % kGroup || pages.block_size <= 0 || pages.block_size % pages.block) return false;
    // Scales change between groups of tokens that are unpacked together, and between whole bytes of a token's codes.
    const bool keys = pages.k.group > 0 && (pages.k.group % kGroup == 0 || pages.k.group >= pages.block);
    const bool values = pages.v.group > 0 && (pages.v.group % 8 == 0 || pages.v.group >= pages.v.rank);
    return keys && values && covered(pages.k, pages) && covered(pages.v, pages);
}

}  // namespace

template <>
struct Form<kvc_block_attend_args> {
    static constexpr bool together = false;
    static int kv_heads(const kvc_block_attend_args& args) { return args.pages.num_kv_heads; }
    static int32_t check(const kvc_block_attend_args& args, int request, int length) {
        if (args.ring_of[request] < 0 || args.ring_of[request] >= args.rings.num_rings) return KVC_BAD_BLOCK;
        const int complete = length / args.pages.block * args.pages.block;
        return check_blocks(args.block_table, args.block_table_stride, request, complete, args.pages.block_size, args.pages.num_blocks);
    }
};

}  // namespace kvcompress::cpu

using namespace kvcompress::cpu;

int32_t kvc_attend_blocks(const kvc_block_attend_args* args) {
    if (!covered(args->pages) || args->num_heads <= 0 || args->num_heads % args->pages.num_kv_heads || args->split_tokens <= 0 ||
        args->split_tokens % args->pages.block || args->rings.places < args->pages.block)
        return KVC_BAD_SHAPE;
    return schedule(*args, kernels_of(args->level).block_attention);
}
