# CUDA kernels with nvcc as a plain compiler and the static runtime, so that the module imports on a
# machine without a driver. Sets P2PFAST_CUDA_OBJECTS, P2PFAST_CUDA_LIBRARIES and, for build_info(),
# P2PFAST_CUDA_VERSION, P2PFAST_CUDA_ARCHITECTURES, P2PFAST_CUDA_REASON (why it was not built).
#
# CMake's own CUDA language is not used: its detection fails on toolkits that keep their libraries in
# lib/ (the ones from PyPI and conda) and it cannot fall back to a build without CUDA.
set(P2PFAST_CUDA_OBJECTS)
set(P2PFAST_CUDA_LIBRARIES)
set(P2PFAST_CUDA_VERSION "")
set(P2PFAST_CUDA_ARCHITECTURES "")
set(P2PFAST_CUDA_REASON "")

if(NOT P2PFAST_CUDA MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "P2PFAST_CUDA=${P2PFAST_CUDA}: choose auto, 0 or 1")
endif()

# sm_80 code also runs on 8.6 and 8.9; sm_90a may use wgmma and TMA; the PTX serves what comes later.
set(cuda_targets -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -gencode
                 arch=compute_90,code=compute_90)
set(cuda_strict)
if(P2PFAST_WERROR)
  set(cuda_strict -Werror all-warnings)
endif()
set(cuda_flags
    -std=c++20
    -O3
    ${cuda_targets}
    ${cuda_strict}
    -Xcompiler
    -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-psabi
    -I${CMAKE_CURRENT_SOURCE_DIR}/csrc)

# Looks for nvcc and checks that it can compile; explains in P2PFAST_CUDA_REASON if not.
function(p2pfast_find_cuda)
  find_program(
    P2PFAST_NVCC nvcc
    HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin
    PATHS /usr/local/cuda/bin)
  if(NOT P2PFAST_NVCC)
    set(P2PFAST_CUDA_REASON "nvcc was not found when p2pfast was built (set CUDA_HOME and rebuild)" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND ${P2PFAST_NVCC} --version OUTPUT_VARIABLE text ERROR_QUIET)
  if(NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(P2PFAST_CUDA_REASON "${P2PFAST_NVCC} --version printed no version" PARENT_SCOPE)
    return()
  endif()
  set(version ${CMAKE_MATCH_1})
  if(version VERSION_LESS 12.0)
    set(P2PFAST_CUDA_REASON "nvcc ${version} is too old (12.0 or later needed)" PARENT_SCOPE)
    return()
  endif()
  # nvcc may be a link or a wrapper; it knows its own toolkit.
  execute_process(COMMAND ${P2PFAST_NVCC} --dryrun -c -x cu /dev/null ERROR_VARIABLE text OUTPUT_QUIET)
  if(text MATCHES "#\\$ TOP=([^\n]+)")
    get_filename_component(root "${CMAKE_MATCH_1}" REALPATH)
  else()
    get_filename_component(root ${P2PFAST_NVCC} REALPATH)
    get_filename_component(root ${root}/../.. ABSOLUTE)
  endif()
  find_library(
    P2PFAST_CUDART cudart_static
    HINTS ${root}/lib64 ${root}/lib ${root}/targets/x86_64-linux/lib ${root}/targets/sbsa-linux/lib
          ${root}/lib/x64 /usr/local/cuda/lib64)
  if(NOT P2PFAST_CUDART)
    set(P2PFAST_CUDA_REASON "libcudart_static.a was not found under ${root}" PARENT_SCOPE)
    return()
  endif()
  set(probe ${CMAKE_CURRENT_BINARY_DIR}/cuda_probe)
  file(WRITE ${probe}.cu "#include <cuda_runtime.h>\n#include <concepts>\n__global__ void probe() {}\n")
  execute_process(
    COMMAND ${P2PFAST_NVCC} -ccbin ${CMAKE_CXX_COMPILER} ${cuda_flags} -c ${probe}.cu -o ${probe}.o
    RESULT_VARIABLE failed
    OUTPUT_VARIABLE text
    ERROR_VARIABLE text)
  if(failed)
    string(REGEX REPLACE "[\n\"\\\\;]+" " " text "${text}")
    string(SUBSTRING "${text}" 0 300 text)
    set(P2PFAST_CUDA_REASON "nvcc ${version} could not compile a test file: ${text}" PARENT_SCOPE)
    return()
  endif()
  set(P2PFAST_CUDA_VERSION ${version} PARENT_SCOPE)
endfunction()

if(P2PFAST_CUDA STREQUAL "0")
  set(P2PFAST_CUDA_REASON "p2pfast was built with P2PFAST_CUDA=0")
elseif(P2PFAST_SANITIZE OR NOT P2PFAST_PYTHON)
  set(P2PFAST_CUDA_REASON "not part of this build")
else()
  p2pfast_find_cuda()
  if(P2PFAST_CUDA_REASON AND P2PFAST_CUDA STREQUAL "1")
    message(FATAL_ERROR "P2PFAST_CUDA=1, but ${P2PFAST_CUDA_REASON}")
  endif()
endif()

if(P2PFAST_CUDA_VERSION)
  set(P2PFAST_CUDA_ARCHITECTURES "sm_80 sm_90a compute_90")
  target_compile_definitions(p2pfast_options INTERFACE P2PFAST_WITH_CUDA)
  file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
  foreach(source IN LISTS cuda_sources)
    get_filename_component(stem ${source} NAME_WE)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda/${stem}.o)
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/cuda
      COMMAND ${P2PFAST_NVCC} -ccbin ${CMAKE_CXX_COMPILER} ${cuda_flags} -MD -MT ${object} -MF ${object}.d -c
              ${source} -o ${object}
      DEPENDS ${source} ${P2PFAST_NVCC}
      DEPFILE ${object}.d
      COMMENT "nvcc ${stem}.cu"
      VERBATIM)
    list(APPEND P2PFAST_CUDA_OBJECTS ${object})
  endforeach()
  set(P2PFAST_CUDA_LIBRARIES ${P2PFAST_CUDART} rt dl Threads::Threads)
  message(STATUS "CUDA ${P2PFAST_CUDA_VERSION}: ${P2PFAST_CUDA_ARCHITECTURES}, ${P2PFAST_CUDART}")
else()
  message(STATUS "CUDA kernels are not built: ${P2PFAST_CUDA_REASON}")
endif()
