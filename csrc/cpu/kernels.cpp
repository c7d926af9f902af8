// One instruction-set level; CMake compiles this file once per level with its flags, KVC_LEVEL (the namespace) and
// KVC_LEVEL_NUMBER (enum kvc_level).
#include "attend.h"
#include "block_attend.h"
#include "encode.h"
#include "gather.h"

namespace kvcompress::cpu::KVC_LEVEL {

extern const Kernels kernels = {
    {attend_scratch_bytes, attend_width, attend, merge<kvc_attend_args, attend_width>, finish},
    {block_scratch_bytes, block_width, attend_blocks, merge<kvc_block_attend_args, block_width>, finish_blocks},
    append_scratch_bytes,
    append,
    gather_scratch_bytes,
    gather,
};

}  // namespace kvcompress::cpu::KVC_LEVEL
