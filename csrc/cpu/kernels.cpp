// One instruction-set level; CMake compiles this file once per level with its flags, KVC_LEVEL (the namespace) and
// KVC_LEVEL_NUMBER (enum kvc_level).
#include "attend.h"
#include "encode.h"

namespace kvcompress::cpu::KVC_LEVEL {

extern const Kernels kernels = {attend_scratch_bytes, attend, merge, finish, append_scratch_bytes, append};

}  // namespace kvcompress::cpu::KVC_LEVEL
