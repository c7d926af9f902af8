#include "cuda/heads/start_decode.h"

template int kvcompress::cuda::start_decode<0, 0>(const LaunchShape&, bool, const AttendArgs&);
