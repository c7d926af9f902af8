// What calls of all forms have in common: the library's version, levels, and sides that kernels know.
#include "cpu/core/schedule.h"

namespace kvcompress::cpu {

const Kernels& kernels_of(int level) {
#ifdef KVC_X86
    if (level > kvc_best_level()) level = kvc_best_level();
    switch (level) {
        case KVC_AVX512VNNI: return avx512vnni::kernels;
        case KVC_AVX512: return avx512::kernels;
        case KVC_AVX2: return avx2::kernels;
        default: return portable::kernels;
    }
#else
    (void)level;
    return portable::kernels;
#endif
}

#define KVC_IS(BITS) || bits == BITS
bool is_code(int bits) { return false KVC_CPU_CODE_BITS(KVC_IS); }
static bool is_float(int bits) { return false KVC_CPU_FLOAT_BITS(KVC_IS); }
#undef KVC_IS

bool covered(const kvc_side& side, int head_dim) {
    int rank = 0;
    int64_t bytes = 0;
    if (side.num_bands < 1 || side.num_bands > KVC_MAX_BANDS) return false;
    for (int band = 0; band < side.num_bands; ++band) {
        const int bits = side.bits[band], width = side.widths[band];
        if ((!is_code(bits) && !is_float(bits)) || width <= 0 || width % 8) return false;
        if ((bits >= 16) != (side.gain_offset < 0) || (bits >= 16 && side.num_bands > 1)) return false;
        rank += width;
        bytes += bits * width / 8;
    }
    if (side.outliers < 0 || side.outliers > KVC_MAX_OUTLIERS) return false;
    if (side.outliers && (side.gain_offset < 0 || side.outlier_offset < 0 || side.channel_offset < 0 || rank > 256))
        return false;
    return rank == side.rank && rank <= head_dim && bytes == side.code_bytes;
}

}  // namespace kvcompress::cpu

using namespace kvcompress::cpu;

int32_t kvc_abi_version(void) { return KVC_ABI_VERSION; }

int32_t kvc_best_level(void) {
#ifdef KVC_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) return KVC_AVX512VNNI;
    if (avx512) return KVC_AVX512;
    if (avx2) return KVC_AVX2;
#endif
    return KVC_PORTABLE;
}
