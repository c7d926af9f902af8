#include "cuda/heads/start_decode.h"

template int kvcompress::cuda::start_decode<8, 8>(const LaunchShape&, bool, const AttendArgs&);
