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

add_library(kvcompress_cuda SHARED)
foreach(source IN ITEMS api blocks encode latent shared store)
  target_sources(kvcompress_cuda PRIVATE csrc/cuda/${source}.cu)
endforeach()
# Their bytes are the reference's.
set_source_files_properties(csrc/cuda/encode.cu csrc/cuda/store.cu PROPERTIES COMPILE_OPTIONS -fmad=false)
target_include_directories(kvcompress_cuda PRIVATE csrc/include)

# decode.cu once per pair of widths, as csrc/cuda/instances.h lists them.
file(STRINGS csrc/cuda/instances.h instances REGEX "^#define KVC_DECODE_INSTANCES")
string(REGEX MATCHALL "X\\([0-9]+, [0-9]+\\)" instances "${instances}")
if(NOT instances)
  message(FATAL_ERROR "csrc/cuda/instances.h lists no instances")
endif()
foreach(instance IN LISTS instances)
  string(REGEX MATCH "([0-9]+), ([0-9]+)" pair "${instance}")
  set(object decode_${CMAKE_MATCH_1}_${CMAKE_MATCH_2})
  add_library(${object} OBJECT csrc/cuda/decode.cu)
  target_compile_definitions(${object} PRIVATE KVC_K_BITS=${CMAKE_MATCH_1} KVC_V_BITS=${CMAKE_MATCH_2})
  target_include_directories(${object} PRIVATE csrc/include)
  target_link_libraries(kvcompress_cuda PRIVATE ${object})
endforeach()

install(TARGETS kvcompress_cuda LIBRARY DESTINATION kvcompress/ops)
