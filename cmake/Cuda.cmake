# What a build with CUDA needs, looked for before llama.cpp is configured.
#
# Without this, a toolkit that is not there, or not all of it, shows as an error of CMake's about a language or a target that
# nobody asked for, or as an #include that fails after minutes of compiling.

# Where NVIDIA's installers put the toolkit, for when nothing else says where it is.
if(NOT DEFINED SLLM_CUDA_DEFAULT_ROOTS)
  file(GLOB SLLM_CUDA_DEFAULT_ROOTS /usr/local/cuda-*)
  list(SORT SLLM_CUDA_DEFAULT_ROOTS COMPARE NATURAL ORDER DESCENDING)
  list(PREPEND SLLM_CUDA_DEFAULT_ROOTS /usr/local/cuda)
  list(APPEND SLLM_CUDA_DEFAULT_ROOTS /opt/cuda)
endif()

set(_sllm_cuda_install "pip install . -C cmake.define.GGML_CUDA=ON")

# Stop with the texts joined, and forget what this run found: the next one may be told of another toolkit, and CMake would go
# on with this one, since it is in the cache.
function(_sllm_cuda_fail)
  foreach(name IN LISTS _sllm_cuda_found_here)
    unset(${name} CACHE)
  endforeach()
  math(EXPR last "${ARGC} - 1")
  foreach(i RANGE ${last})
    string(APPEND text "${ARGV${i}}")  # not ${ARGV} as a whole: a semicolon would be lost
  endforeach()
  message(FATAL_ERROR "${text}\nTo build without CUDA, give -C cmake.define.GGML_CUDA=OFF instead.")
endfunction()

# The nvcc that is to be used, where CMake would look for it, and in one place: CMake looks for a compiler and for a toolkit,
# each in its own way, and can end up with two.
function(_sllm_find_nvcc result)
  set(name CMAKE_CUDA_COMPILER)
  set(given "${CMAKE_CUDA_COMPILER}")
  if(NOT given)
    set(name CUDACXX)
    set(given "$ENV{CUDACXX}")
  endif()
  if(given)
    get_filename_component(nvcc "${given}" PROGRAM)
    if(NOT EXISTS "${nvcc}")
      _sllm_cuda_fail("${name} is ${given}, and there is no such program. Name the compiler of a CUDA toolkit: "
                      "TOOLKIT/bin/nvcc.")
    endif()
    set(${result} "${nvcc}" PARENT_SCOPE)
    return()
  endif()

  set(root "${CUDAToolkit_ROOT}")
  if(NOT root)
    set(root "$ENV{CUDAToolkit_ROOT}")
  endif()
  if(root)
    find_program(nvcc nvcc PATHS "${root}" PATH_SUFFIXES bin NO_DEFAULT_PATH NO_CACHE)
    if(NOT nvcc)
      _sllm_cuda_fail("CUDAToolkit_ROOT is ${root}, and there is no bin/nvcc in it. Name the folder of a CUDA "
                      "toolkit, with its compiler.")
    endif()
    set(${result} "${nvcc}" PARENT_SCOPE)
    return()
  endif()

  find_program(nvcc nvcc PATHS ENV CUDA_PATH ${SLLM_CUDA_DEFAULT_ROOTS} PATH_SUFFIXES bin NO_CACHE)
  if(NOT nvcc)
    if(DEFINED ENV{CUDA_PATH})
      set(nor ", nor in CUDA_PATH ($ENV{CUDA_PATH})")
    endif()
    list(GET SLLM_CUDA_DEFAULT_ROOTS 0 usual)
    _sllm_cuda_fail("GGML_CUDA is on and there is no CUDA compiler: nvcc is not on PATH, nor in ${usual}${nor}. "
                    "The driver alone, with which nvidia-smi works, is not enough. Install the CUDA toolkit, or say "
                    "where it is:\n"
                    "  CUDACXX=TOOLKIT/bin/nvcc ${_sllm_cuda_install}")
  endif()
  set(${result} "${nvcc}" PARENT_SCOPE)
endfunction()

# Whether nvcc and the compiler of the host that it works with go together, and all headers that ggml includes are there.
function(_sllm_check_nvcc nvcc version command include_dirs)
  set(dir "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/sllm-cuda")
  file(WRITE "${dir}/check.cu" [=[
#include <cuda_runtime.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cublas_v2.h>
#if CUDART_VERSION >= 11070 && !__has_include(<cub/cub.cuh>)
#error cub/cub.cuh: No such file
#endif
__global__ void kernel() {}
]=])
  list(TRANSFORM include_dirs PREPEND "-I")
  execute_process(COMMAND "${CMAKE_COMMAND}" -E env LC_ALL=C ${command} -std=c++17 ${include_dirs} -c check.cu -o check.o
                  WORKING_DIRECTORY "${dir}" RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT failed)
    return()
  endif()
  string(STRIP "${output}" output)
  string(REGEX REPLACE "\n" "\n  " output "\n${output}")  # indented, CMake leaves the lines as they are
  set(toolkit "The CUDA ${version} toolkit of ${nvcc}")

  if(output MATCHES "unsupported (GNU|clang|Microsoft Visual Studio) version[^\n]*")
    string(REGEX REPLACE "The nvcc flag .*" "" why "${CMAKE_MATCH_0}")
    string(STRIP "${why}" why)
    _sllm_cuda_fail("nvcc ${version} (${nvcc}) does not go with this machine's C++ compiler: ${why}\n"
                    "Install a C++ compiler that it knows, and name it:\n"
                    "  ${_sllm_cuda_install} -C cmake.define.CMAKE_CUDA_HOST_COMPILER=/usr/bin/g++-N\n"
                    "or install a newer CUDA toolkit.")
  elseif(output MATCHES "(fatal error: |#error )'?([^ :'\n]+\\.(h|hpp|cuh))'?(: No such file| file not found)")
    set(header "${CMAKE_MATCH_2}")
    if(header MATCHES "^cublas")
      _sllm_cuda_fail("${toolkit} has no cuBLAS headers (${header}). Install cuBLAS for CUDA ${version} with its "
                      "development files (in NVIDIA's packages: libcublas-dev), or say where they are:\n"
                      "  ${_sllm_cuda_install} -C cmake.define.CMAKE_CUDA_FLAGS=-IFOLDER")
    elseif(header MATCHES "^(cub|thrust|cuda/std)/")
      _sllm_cuda_fail("${toolkit} has no CCCL headers (${header}). Install that part of the toolkit (in NVIDIA's "
                      "packages: cuda-cccl).")
    endif()
    _sllm_cuda_fail("${toolkit} is not complete: it has no ${header}. Install the rest of it (in NVIDIA's packages, "
                    "cuda-cudart-dev has the headers of the runtime, and cuda-toolkit has everything).")
  elseif(output MATCHES "(cicc|ptxas|fatbinary|cudafe\\+\\+): (not found|No such file)")
    _sllm_cuda_fail("${toolkit} is not complete: it has no ${CMAKE_MATCH_1}. Install the rest of it.")
  endif()
  _sllm_cuda_fail("nvcc ${version} (${nvcc}) cannot compile an empty kernel with ggml's headers. It says:${output}")
endfunction()

# Whether nvcc compiles for the GPUs that were asked for, and for which it does where none were.
function(_sllm_check_architectures nvcc version command)
  string(CONCAT choose
    "  ${_sllm_cuda_install} -C cmake.define.CMAKE_CUDA_ARCHITECTURES=90\n"
    "with 75 for the RTX 20 series and the T4, 80 for the A100, 86 for the RTX 30 series, 89 for the RTX 40 series and the L4, "
    "90 for the H100 and H200, 120 for the RTX 50 series, or several with semicolons between them (in quotes).")
  set(dry_run "${CMAKE_COMMAND}" -E env LC_ALL=C ${command} --dryrun)

  set(asked "${CMAKE_CUDA_ARCHITECTURES}")
  if(NOT asked AND NOT "$ENV{CUDAARCHS}" STREQUAL "")
    set(asked "$ENV{CUDAARCHS}")
  endif()
  foreach(architecture IN LISTS asked)
    if(architecture MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
      set(number "${CMAKE_MATCH_1}")
      execute_process(COMMAND ${dry_run} -gencode "arch=compute_${number},code=sm_${number}" -c check.cu -o check.o
                      WORKING_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/sllm-cuda"
                      RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
      if(failed AND output MATCHES "[Uu]nsupported gpu architecture")
        execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
        string(REGEX REPLACE "[ \r\n]+" ", " known "${known}")
        string(REPLACE "compute_" "" known "${known}")
        if(known)
          set(known " It knows: ${known}.")
        endif()
        _sllm_cuda_fail("nvcc ${version} (${nvcc}) does not compile for ${number}, which CMAKE_CUDA_ARCHITECTURES "
                        "names.${known} Choose among them, or install a toolkit for that GPU: a newer one for a newer GPU, an "
                        "older one for one that is no longer supported.")
      endif()
    endif()
  endforeach()
  if(asked AND NOT asked STREQUAL "native")
    message(STATUS "CUDA kernels are compiled for: ${asked}")
    return()
  endif()

  # ggml's own default is the GPU at hand, or its list where the build is not for the machine at hand.
  if(NOT DEFINED GGML_NATIVE)
    set(GGML_NATIVE ON)
    if(CMAKE_CROSSCOMPILING OR DEFINED ENV{SOURCE_DATE_EPOCH})
      set(GGML_NATIVE OFF)
    endif()
  endif()
  if(NOT asked AND (NOT GGML_NATIVE OR version VERSION_LESS 11.6))
    message(STATUS "CUDA kernels are compiled for llama.cpp's whole list of GPUs, which takes long. For yours alone:\n"
            "${choose}")
    return()
  endif()
  execute_process(COMMAND ${dry_run} -arch=native -c check.cu -o check.o
                  WORKING_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/sllm-cuda"
                  OUTPUT_VARIABLE output ERROR_VARIABLE output)
  string(REGEX MATCHALL "sm_[0-9]+[af]?" found "${output}")
  list(REMOVE_DUPLICATES found)
  list(TRANSFORM found REPLACE "^sm_([0-9]+)([0-9])" "\\1.\\2")
  list(JOIN found ", " found)
  if(output MATCHES "[Cc]annot find valid GPU")
    if(found)
      set(default ", compute capability ${found}")
    endif()
    message(WARNING "No GPU is found here, and CMAKE_CUDA_ARCHITECTURES does not say which to compile for, so nvcc takes "
                    "its default${default}. Newer GPUs run that, but not at their speed, and older ones do not. Name the GPU "
                    "that sllm is going to use:\n${choose}")
  else()
    message(STATUS "CUDA kernels are compiled for the GPU found here, of compute capability ${found}")
  endif()
endfunction()

# Stop with what is missing, if a build with GGML_CUDA=ON cannot succeed. C or C++ has to be enabled before.
function(sllm_check_cuda)
  foreach(name IN ITEMS CUDAToolkit_BIN_DIR CUDAToolkit_NVCC_EXECUTABLE CUDAToolkit_SENTINEL_FILE CUDA_CUDART
          CUDA_cublas_LIBRARY CUDA_cublasLt_LIBRARY CUDA_cuda_driver_LIBRARY
          _cmake_CUDAToolkit_include_directories _cmake_CUDAToolkit_implicit_link_directories)
    if(NOT ${name})
      list(APPEND _sllm_cuda_found_here ${name})
    elseif(name MATCHES "LIBRARY$" AND NOT EXISTS "${${name}}")
      _sllm_cuda_fail("${name} is ${${name}}, and there is no such file. Name a library, or leave the option out.")
    endif()
  endforeach()

  _sllm_find_nvcc(nvcc)
  execute_process(COMMAND "${nvcc}" --version RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed OR NOT output MATCHES "release ([0-9]+\\.[0-9]+)")
    _sllm_cuda_fail("${nvcc} is no nvcc that works: `nvcc --version` says \"${output}\" (${failed}). "
                    "Install the CUDA toolkit, or name another:\n"
                    "  CUDACXX=TOOLKIT/bin/nvcc ${_sllm_cuda_install}")
  endif()
  set(version "${CMAKE_MATCH_1}")

  # As CMake is going to call it.
  set(flags "${CMAKE_CUDA_FLAGS}")
  if(NOT DEFINED CMAKE_CUDA_FLAGS)
    set(flags "$ENV{CUDAFLAGS}")
  endif()
  separate_arguments(flags NATIVE_COMMAND "${flags}")
  set(host "$ENV{CUDAHOSTCXX}")
  if(NOT host)
    set(host "${CMAKE_CUDA_HOST_COMPILER}")
  endif()
  if(host)
    list(APPEND flags "-ccbin=${host}")
  endif()
  set(command "${nvcc}" ${flags})

  # From where this nvcc is, and for llama.cpp's own find_package() as well, which goes by what the cache has.
  get_filename_component(root "${nvcc}" DIRECTORY)
  get_filename_component(CUDAToolkit_ROOT "${root}" DIRECTORY)
  find_package(CUDAToolkit QUIET)

  _sllm_check_nvcc("${nvcc}" "${version}" "${command}" "${CUDAToolkit_INCLUDE_DIRS}")
  if(NOT CUDAToolkit_FOUND)
    _sllm_cuda_fail("The CUDA ${version} toolkit of ${nvcc} has no runtime library (libcudart.so). Install it (in "
                    "NVIDIA's packages: cuda-cudart-dev).")
  endif()
  if(NOT TARGET CUDA::cublas)
    _sllm_cuda_fail("The CUDA ${version} toolkit of ${nvcc} has no cuBLAS library (libcublas.so). Install cuBLAS for "
                    "CUDA ${version} (in NVIDIA's packages: libcublas-dev), or say where it is:\n"
                    "  ${_sllm_cuda_install} -C cmake.define.CUDA_cublas_LIBRARY=FOLDER/libcublas.so "
                    "-C cmake.define.CUDA_cublasLt_LIBRARY=FOLDER/libcublasLt.so")
  endif()
  if(NOT GGML_CUDA_NO_VMM AND NOT TARGET CUDA::cuda_driver)
    _sllm_cuda_fail("There is no libcuda.so to link: neither the driver's nor the toolkit's stub of it (in NVIDIA's packages: "
                    "cuda-driver-dev). Install one of them, or build without the driver's virtual memory management, which is "
                    "all that needs it:\n"
                    "  ${_sllm_cuda_install} -C cmake.define.GGML_CUDA_NO_VMM=ON")
  endif()
  _sllm_check_architectures("${nvcc}" "${version}" "${command}")

  # Only now, since a compiler that does not work would stay in the cache.
  if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
    set(CMAKE_CUDA_COMPILER "${nvcc}" CACHE FILEPATH "CUDA compiler")
  endif()
endfunction()
