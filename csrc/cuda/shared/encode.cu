// Encoding latents into records: the C interface. Compiled without fused multiply-add: bytes are then the reference's.
#include "cuda/shared/encode.h"
#include "cuda/shared/make_record.h"

using namespace kvcompress::cuda;

int32_t kvc_cuda_shared_store(const kvc_shared_store_args* from) {
    StoreArgs args{};
    Stripe stripe{};
    if (!make_record(from->records, args.record) || !make_stripe(from->records, stripe) ||
        from->latents.dtype != KVC_FLOAT32)
        return -KVC_BAD_SHAPE;
    if (from->num_tokens == 0) return KVC_OK;
    args.data = from->records.data, args.block_stride = from->records.block_stride;
    args.num_slots = from->records.num_blocks * from->records.block_size;
    args.block_size = from->records.block_size, args.records = from->records.records;
    args.latents = static_cast<const float*>(from->latents.data);
    args.token_stride = from->latents.token_stride, args.record_stride = from->latents.head_stride;
    args.weight = from->weight_HR, args.slots = from->slots, args.num_tokens = from->num_tokens;
    constexpr int kWarps = kEncodeThreads / 32;
    const Grid grid{static_cast<int>((args.num_tokens * args.records + kWarps - 1) / kWarps), 1, 1};
    const int units = (args.record.rank / kGroup + 31) / 32;
    return units == 1   ? launch<store<1>>(grid, kEncodeThreads, 0, from->run.stream, args)
           : units == 2 ? launch<store<2>>(grid, kEncodeThreads, 0, from->run.stream, args)
                        : launch<store<kMaxUnits / 32>>(grid, kEncodeThreads, 0, from->run.stream, args);
}
