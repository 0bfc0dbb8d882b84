# Kernels of ggml's that are left out, since with them one row and several, or a model and its parts, no longer agree to the bit
# (sllm/engine/exact.py; tests/engine/test_exact.py looks at those that are left in).

# AMX, the matrix unit of Intel's Xeons from Sapphire Rapids on: compiled only where SLLM_AMX asks for it.

include(CheckCCompilerFlag)

# Undo what -march=native and the like turn on: the last flag counts.
function(sllm_without_amx target)
  if(NOT TARGET ${target} OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" OR MSVC)
    return()
  endif()
  foreach(part IN ITEMS tile int8 bf16 fp16 complex)
    check_c_compiler_flag(-mno-amx-${part} SLLM_HAS_NO_AMX_${part})
    if(SLLM_HAS_NO_AMX_${part})
      target_compile_options(${target} PRIVATE -mno-amx-${part})
    endif()
  endforeach()
endfunction()

# llamafile's products for several rows, on CPUs with AVX and without AVX2: they add up the halves of a block in another order than the
# product for one row (tinyBLAS_Q0_AVX::gemm against ggml_vec_dot_q8_0_q8_0). With AVX2, and with SSE alone, the order is the same.
function(sllm_without_llamafile target)
  get_target_property(definitions ${target} COMPILE_DEFINITIONS)
  list(REMOVE_ITEM definitions GGML_USE_LLAMAFILE)
  set_property(TARGET ${target} PROPERTY COMPILE_DEFINITIONS "${definitions}")
endfunction()

function(sllm_warn_without_amx target)
  if(TARGET ${target} AND GGML_NATIVE)
    include(CheckCSourceCompiles)
    set(CMAKE_REQUIRED_FLAGS "-march=native")
    check_c_source_compiles("
      #ifndef __AMX_INT8__
      #error
      #endif
      int main(void) { return 0; }" SLLM_NATIVE_HAS_AMX)
    if(NOT SLLM_NATIVE_HAS_AMX)
      message(WARNING "SLLM_AMX is ON, and this machine's CPU has no AMX: a build for it has no such kernels. With "
                      "SLLM_PORTABLE=ON they are built for the machines that have it.")
    endif()
  endif()
endfunction()

# The same for kernels of one set, of which only the compiler knows what -march=native means.
function(sllm_only_exact_kernels target)
  if(NOT TARGET ${target} OR MSVC)
    return()
  endif()
  include(CheckCSourceCompiles)
  get_target_property(flags ${target} COMPILE_OPTIONS)
  list(FILTER flags INCLUDE REGEX "^-m")
  list(JOIN flags " " CMAKE_REQUIRED_FLAGS)
  unset(SLLM_AVX_WITHOUT_AVX2 CACHE)  # other flags, another answer
  check_c_source_compiles("
    #if !defined(__AVX__) || defined(__AVX2__)
    #error
    #endif
    int main(void) { return 0; }" SLLM_AVX_WITHOUT_AVX2)
  if(SLLM_AVX_WITHOUT_AVX2)
    sllm_without_llamafile(${target})
  endif()
endfunction()
