#include "cuda/heads/start_decode.h"

template int kvcompress::cuda::start_decode<2, 2>(const LaunchShape&, bool, const AttendArgs&);
