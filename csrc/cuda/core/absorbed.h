// Launches of attention on rows: the batch, splits and their workspace, and merging them.
#pragma once

#include "cuda/core/combine.h"
#include "cuda/core/launch.h"

namespace kvcompress::cuda {

// What kernels know of the batch.
inline void set_batch(const kvc_batch& from, const kvc_run& run, int num_kv_heads, AttendArgs& args) {
    args.pages.num_heads = num_kv_heads;
    args.query_starts = from.query_starts, args.seq_lens = from.seq_lens;
    args.num_heads = from.num_heads, args.group = from.num_heads / num_kv_heads;
    args.row_tiles = (run.max_query_len * args.group + kRows - 1) / kRows;
    args.softmax_scale = from.softmax_scale;
}

// Where rows of `width` floats and their lse go: to the workspace if splits are to be merged.
inline void set_output(const kvc_batch& batch, const kvc_run& run, int width, float* output, float* lse, float*& to,
                       float*& lse_to) {
    const bool partial = run.splits > 1;
    to = partial ? run.workspace : output;
    lse_to = partial ? run.workspace + run.splits * run.num_tokens * batch.num_heads * width : lse;
}

// Merges the splits of rows that `set_output` has sent to the workspace.
inline int start_combine(const kvc_batch& batch, const kvc_run& run, int num_kv_heads, int width, float* output,
                         float* lse) {
    if (run.splits == 1) return KVC_OK;
    CombineArgs args{nullptr,
                     nullptr,
                     output,
                     lse,
                     batch.query_starts,
                     run.splits,
                     width,
                     batch.num_heads,
                     batch.num_heads / num_kv_heads,
                     run.num_tokens * batch.num_heads};
    float *partial_output, *partial_lse;
    set_output(batch, run, width, output, lse, partial_output, partial_lse);
    args.partial_output = partial_output, args.partial_lse = partial_lse;
    return launch<combine>({run.max_query_len * args.group, num_kv_heads, batch.num_requests}, kMaxThreads, 0,
                           run.stream, args);
}

// Attention in latent space: args.pages are there, start(shape) launches a kernel.
template <typename LayOut, typename Start>
int attend_absorbed(const kvc_absorbed& from, AttendArgs& args, const LayOut& lay_out, const Start& start) {
    const kvc_batch& batch = from.batch;
    const kvc_run& run = from.run;
    const int heads = args.pages.num_heads, rank = args.pages.v.rank;
    if (run.splits < 1 || batch.num_heads <= 0 || batch.num_heads % heads) return -KVC_BAD_SHAPE;
    if (batch.num_requests == 0 || run.max_query_len == 0) return KVC_OK;
    set_batch(batch, run, heads, args);
    set_output(batch, run, rank, from.output_THR, from.lse_TH, args.output, args.lse);
    args.query = from.query_THR;
    args.rows = run.num_tokens * batch.num_heads;
    args.table = batch.block_table, args.table_stride = batch.block_table_stride;
    int64_t limit = 0;
    if (const int error = shared_limit(limit)) return error;
    const int warps = warps_for(limit, lay_out);
    if (!warps) return -KVC_BAD_SHAPE;
    const LaunchShape shape{
        {run.splits, heads * args.row_tiles, batch.num_requests}, 32 * warps, lay_out(warps), run.stream};
    if (const int error = start(shape)) return error;
    return start_combine(batch, run, heads, rank, from.output_THR, from.lse_TH);
}

}  // namespace kvcompress::cuda
