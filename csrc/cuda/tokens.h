// Launches of the kernels that encode and decode tokens.
#pragma once

#include "gather.h"

namespace kvcompress::cuda {

// Tokens into their slots.
int start_append(const EncodeArgs& args, void* stream);

// Whole blocks of tokens.
int start_compress(const EncodeArgs& args, void* stream);

int start_gather(const GatherArgs& args, void* stream);

}  // namespace kvcompress::cuda
