# A portable build: ggml as shared libraries with names of their own, and its CPU kernels as one module for each generation of CPUs, of
# which sllm/engine/cpu.py chooses one when it is loaded (llama.cpp's GGML_BACKEND_DL and GGML_CPU_ALL_VARIANTS).
#
# In the package:
#
#     sllm/_core.abi3.so                        llama.cpp itself, as always inside the extension and visible to nobody
#     sllm/lib/libsllm-ggml-base-COMMIT.so      found by the extension through $ORIGIN/lib
#     sllm/lib/libsllm-ggml-COMMIT.so           the list of backends
#     sllm/lib/libsllm-ggml-cpu-haswell.so ...  loaded by path when first needed
#     sllm/lib/libsllm-ggml-rpc.so ...          other backends that the build was asked for
#
# The commit in the SONAME keeps a backend that was built for another ggml from being loaded.

# Which systems llama.cpp has variants for (ggml/src/CMakeLists.txt). Elsewhere a portable build is one set of kernels.
function(sllm_has_cpu_variants result)
  set(${result} OFF PARENT_SCOPE)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64|aarch64|arm64|ppc64le|s390x|riscv64)$")
    set(${result} ON PARENT_SCOPE)
  elseif(APPLE AND CMAKE_SYSTEM_PROCESSOR STREQUAL "arm64")
    set(${result} ON PARENT_SCOPE)
  endif()
endfunction()

# The compiler reads a header first that renames what crosses the libraries: see prefix_symbols.py.
macro(sllm_prefix_symbols ggml_dir)
  set(prefix_header "${CMAKE_CURRENT_BINARY_DIR}/sllm_prefix.h")
  execute_process(COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/prefix_symbols.py" "${ggml_dir}" "${prefix_header}"
                  ERROR_VARIABLE reason RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${reason}")
  endif()
  foreach(language IN ITEMS C CXX CUDA OBJC OBJCXX HIP)
    add_compile_options("$<$<COMPILE_LANGUAGE:${language}>:SHELL:-include \"${prefix_header}\">")
  endforeach()
endmacro()

# Spelled as in /proc/cpuinfo, like everything about features here.
set(sllm_features_GGML_SSE42 sse4_2)
set(sllm_features_GGML_AVX avx)
set(sllm_features_GGML_F16C f16c)
set(sllm_features_GGML_FMA fma)
set(sllm_features_GGML_AVX2 avx2)
set(sllm_features_GGML_BMI2 bmi2)
set(sllm_features_GGML_AVX_VNNI avx_vnni)
set(sllm_features_GGML_AVX512 avx512f avx512cd avx512vl avx512dq avx512bw)
set(sllm_features_GGML_AVX512_VBMI avx512vbmi)
set(sllm_features_GGML_AVX512_VNNI avx512_vnni)
set(sllm_features_GGML_AVX512_BF16 avx512_bf16)
set(sllm_features_GGML_AMX_TILE amx_tile)
set(sllm_features_GGML_AMX_INT8 amx_int8)
set(sllm_features_GGML_USE_DOTPROD asimddp)
set(sllm_features_GGML_USE_FP16_VECTOR_ARITHMETIC asimdhp)
set(sllm_features_GGML_USE_SVE sve)
set(sllm_features_GGML_USE_SVE2 sve2)
set(sllm_features_GGML_USE_MATMUL_INT8 i8mm)
set(sllm_features_GGML_USE_SME sme)

# After ggml was added: rename, set where libraries look for each other, and collect the modules in `modules_result` and
# "NAME:FEATURES;NAME:FEATURES" in `variants_result`.
function(sllm_arrange_portable tag modules_result variants_result)
  set(modules "")
  set(variants "")
  set(known "")
  foreach(backend IN LISTS GGML_AVAILABLE_BACKENDS)
    if(NOT TARGET ${backend})
      continue()  # of an earlier configure with other options
    endif()
    string(REGEX REPLACE "^ggml-" "" name "${backend}")
    get_target_property(definitions ${backend} COMPILE_DEFINITIONS)
    if(name MATCHES "^cpu-")
      string(REGEX REPLACE "^cpu-" "" variant "${name}")
      list(APPEND known ${variant})
      if(("GGML_AMX_INT8" IN_LIST definitions AND NOT SLLM_AMX)
         OR (SLLM_CPU_VARIANTS AND NOT variant IN_LIST SLLM_CPU_VARIANTS))
        # Upstream's list is one piece: such a variant stays a target, of nothing.
        file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/left_out.c" "extern int sllm_left_out;\nint sllm_left_out = 0;\n")
        set_property(TARGET ${backend} PROPERTY SOURCES "${CMAKE_CURRENT_BINARY_DIR}/left_out.c")
        continue()
      endif()
      set(features "")
      foreach(definition IN LISTS definitions)
        list(APPEND features ${sllm_features_${definition}})
      endforeach()
      if("avx" IN_LIST features AND NOT "avx2" IN_LIST features)
        sllm_without_llamafile(${backend})
      endif()
      list(JOIN features " " features)
      list(APPEND variants "${variant}:${features}")
    endif()
    list(APPEND modules ${backend})
  endforeach()
  foreach(variant IN LISTS SLLM_CPU_VARIANTS)
    if(NOT variant IN_LIST known)
      list(JOIN known ", " known)
      message(FATAL_ERROR "SLLM_CPU_VARIANTS names ${variant}, and llama.cpp has ${known}.")
    endif()
  endforeach()
  if(NOT variants)
    message(FATAL_ERROR "SLLM_CPU_VARIANTS leaves no variant to build.")
  endif()
  foreach(library IN ITEMS ggml-base ggml)
    set_target_properties(${library} PROPERTIES OUTPUT_NAME "sllm-${library}-${tag}" PREFIX lib)
  endforeach()
  foreach(module IN LISTS modules)
    set_target_properties(${module} PROPERTIES OUTPUT_NAME "sllm-${module}" PREFIX lib)
  endforeach()
  set_property(TARGET ggml PROPERTY PUBLIC_HEADER)  # or installing it is warned of: where would they go?
  foreach(library IN LISTS modules ITEMS ggml-base ggml)
    target_compile_options(${library} PRIVATE -w)  # ggml's own #define of two of the names is one warning in every file
    # Versions of libraries are symbolic links, and a wheel has copies in place of these.
    set_property(TARGET ${library} PROPERTY VERSION)
    set_property(TARGET ${library} PROPERTY SOVERSION)
    if(APPLE)
      set_target_properties(${library} PROPERTIES INSTALL_RPATH "@loader_path" INSTALL_NAME_DIR "@rpath")
    else()
      set_target_properties(${library} PROPERTIES INSTALL_RPATH "$ORIGIN")
      # Nothing but what the others need is visible, the standard library's templates among it.
      target_link_options(${library} PRIVATE "LINKER:-z,defs" "LINKER:--version-script=${CMAKE_CURRENT_SOURCE_DIR}/cmake/ggml_exports.map")
      set_property(TARGET ${library} APPEND PROPERTY LINK_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/cmake/ggml_exports.map")
    endif()
  endforeach()
  set(${modules_result} "${modules}" PARENT_SCOPE)
  set(${variants_result} "${variants}" PARENT_SCOPE)
endfunction()
