// The C interface of the form `blocks`.
#include "cpu/core/schedule.h"

namespace kvcompress::cpu {
namespace {

bool covered(const kvc_blocks_side& side, const kvc_blocks_pages& pages) {
    const bool codes = is_code(side.bits) && side.rank > 0 && side.rank % 8 == 0 && side.rank <= pages.head_dim;
    const bool rest = side.low_rank >= 0 && side.low_rank <= kMaxLowRank && side.outliers >= 0 &&
                      side.outliers <= pages.block * side.rank && side.outliers % 8 == 0 && side.nbytes > 0;
    return codes && rest && pages.block * side.rank <= 1 << 16;
}

bool covered(const kvc_blocks_pages& pages) {
    if (pages.head_dim <= 0 || pages.head_dim > kMaxHeadDim || pages.head_dim % 8 || pages.num_kv_heads <= 0)
        return false;
    if (pages.block <= 0 || pages.block % kGroup || pages.block_size <= 0 || pages.block_size % pages.block)
        return false;
    // Scales change between groups of tokens that are unpacked together, and between whole bytes of a token's codes.
    const bool keys = pages.k.group > 0 && (pages.k.group % kGroup == 0 || pages.k.group >= pages.block);
    const bool values = pages.v.group > 0 && (pages.v.group % 8 == 0 || pages.v.group >= pages.v.rank);
    return keys && values && covered(pages.k, pages) && covered(pages.v, pages);
}

}  // namespace

template <>
struct Form<kvc_blocks_attend_args> {
    static constexpr bool together = false;
    static int kv_heads(const kvc_blocks_attend_args& args) { return args.pages.num_kv_heads; }
    static int32_t check(const kvc_blocks_attend_args& args, int request, int length) {
        if (args.ring_of[request] < 0 || args.ring_of[request] >= args.rings.num_rings) return KVC_BAD_BLOCK;
        const int complete = length / args.pages.block * args.pages.block;
        return check_blocks(args.batch, request, complete, args.pages.block_size, args.pages.num_blocks);
    }
};

}  // namespace kvcompress::cpu

using namespace kvcompress::cpu;

int32_t kvc_blocks_attend(const kvc_blocks_attend_args* args) {
    const kvc_blocks_pages& pages = args->pages;
    if (!covered(pages) || !covered(args->batch, args->run, pages.num_kv_heads, pages.block) ||
        args->rings.places < pages.block)
        return KVC_BAD_SHAPE;
    return schedule(*args, kernels_of(args->run.level).block_attention);
}
