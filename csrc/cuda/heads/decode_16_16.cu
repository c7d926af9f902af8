#include "cuda/heads/start_decode.h"

template int kvcompress::cuda::start_decode<16, 16>(const LaunchShape&, bool, const AttendArgs&);
