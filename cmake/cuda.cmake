# The CUDA kernels: sm_80 also runs on sm_86 and sm_89; PTX of sm_90 on what comes after. The CUDA runtime is linked
# statically, so that the library loads wherever torch does.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*/*.cu)
add_library(kvcompress_cuda SHARED ${sources})
# Their bytes are the reference's.
file(GLOB encoders CONFIGURE_DEPENDS csrc/cuda/*/encode.cu)
set_source_files_properties(${encoders} PROPERTIES COMPILE_OPTIONS -fmad=false)
target_include_directories(kvcompress_cuda PRIVATE csrc csrc/include)

install(TARGETS kvcompress_cuda LIBRARY DESTINATION kvcompress/ops)
