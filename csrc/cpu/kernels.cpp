// One instruction-set level; CMake compiles this file once per level with its flags, KVC_LEVEL (the namespace) and
// KVC_LEVEL_NUMBER (enum kvc_level).
#include "cpu/blocks/attend.h"
#include "cpu/heads/append.h"
#include "cpu/heads/attend.h"
#include "cpu/latent/attend.h"
#include "cpu/shared/attend.h"

namespace kvcompress::cpu::KVC_LEVEL {

extern const Kernels kernels = {
    {attend_scratch_bytes, attend_width, attend, merge, finish},
    append_scratch_bytes,
    append,
    {block_scratch_bytes, block_width, attend_blocks, merge_blocks, finish_blocks},
    {latent::scratch_bytes, latent::width, latent::attend, latent::merge, latent::finish},
    latent::append,
    {shared::scratch_bytes, shared::width, shared::attend, shared::merge, shared::finish},
    store_scratch_bytes,
    store_token,
};

}  // namespace kvcompress::cpu::KVC_LEVEL
