# find_package(dmm): builds dmm::runtime from its sources against the torch that is at hand, so that no ABI can disagree.
#
#   find_package(Torch REQUIRED)     # or -DDMM_TORCH=<the torch package>, where a CUDA build of torch finds no CUDA toolkit
#   find_package(dmm REQUIRED)       # -Ddmm_DIR=$(dmm-fast runtime --cmake-dir)
#   target_link_libraries(app PRIVATE dmm::runtime)      # #include <dmm/segmenter.h>
#
# dmm::readers is the part without torch: frames, masks, proposals, manifests, safetensors. C++20; libjpeg and libpng.
include_guard(GLOBAL)

foreach(library JPEG PNG)
  find_package(${library} QUIET)
  if(NOT ${library}_FOUND)
    message(FATAL_ERROR "dmm: ${library} and its headers are missing; on Debian and Ubuntu: apt-get install libjpeg-dev "
                        "libpng-dev")
  endif()
endforeach()

set(dmm_readers files.cpp frames.cpp image.cpp json.cpp manifest.cpp proposals.cpp safetensors.cpp sha256.cpp)
set(dmm_networks model.cpp package.cpp segmenter.cpp torchscript.cpp)
list(TRANSFORM dmm_readers PREPEND "${CMAKE_CURRENT_LIST_DIR}/")
list(TRANSFORM dmm_networks PREPEND "${CMAKE_CURRENT_LIST_DIR}/")

add_library(dmm_readers STATIC EXCLUDE_FROM_ALL ${dmm_readers})
add_library(dmm::readers ALIAS dmm_readers)
target_include_directories(dmm_readers PUBLIC "${CMAKE_CURRENT_LIST_DIR}")
target_compile_features(dmm_readers PUBLIC cxx_std_20)
target_link_libraries(dmm_readers PRIVATE JPEG::JPEG PNG::PNG)
set_target_properties(dmm_readers PROPERTIES POSITION_INDEPENDENT_CODE ON)

if(NOT TARGET torch AND DMM_TORCH AND NOT DMM_READERS_ONLY)
  if(NOT EXISTS "${DMM_TORCH}/lib/libtorch_cpu.so")
    message(FATAL_ERROR "dmm: DMM_TORCH must name a torch package (python -c 'import torch; print(torch.__path__[0])'), "
                        "got '${DMM_TORCH}'")
  endif()
  add_library(torch INTERFACE IMPORTED)
  target_include_directories(torch SYSTEM INTERFACE "${DMM_TORCH}/include" "${DMM_TORCH}/include/torch/csrc/api/include")
  # CUDA's part of torch is loaded when a CUDA device is asked for: a program that stays on the CPU starts without it.
  target_link_libraries(torch INTERFACE "${DMM_TORCH}/lib/libtorch_cpu.so" "${DMM_TORCH}/lib/libc10.so")
endif()
if(TARGET torch)
  add_library(dmm_runtime STATIC EXCLUDE_FROM_ALL ${dmm_networks})
  add_library(dmm::runtime ALIAS dmm_runtime)
  target_link_libraries(dmm_runtime PUBLIC dmm_readers torch PRIVATE ${CMAKE_DL_LIBS})
  set_target_properties(dmm_runtime PROPERTIES POSITION_INDEPENDENT_CODE ON)
elseif(NOT DMM_READERS_ONLY)
  message(FATAL_ERROR "dmm: no torch: find_package(Torch) first, or name the torch package with -DDMM_TORCH=..")
endif()
