# What has to hold before llama.cpp's AMX kernels are built in (SLLM_AMX=ON).

include_guard(GLOBAL)
include(CheckCXXCompilerFlag)

# Stop with a message unless the llama.cpp in llama_dir has AMX kernels that are right, the target is x86-64 and the
# compiler knows the instructions. C++ has to be an enabled language.
function(sllm_check_amx llama_dir)
  set(or_without "or build without AMX, which is the default: leave SLLM_AMX out, or pass\n"
                 "  pip install . -C cmake.define.SLLM_AMX=OFF")
  string(CONCAT or_without ${or_without})

  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    message(FATAL_ERROR "SLLM_AMX is ON, and AMX is of x86-64; this build is for \"${CMAKE_SYSTEM_PROCESSOR}\". Build "
                        "without it: leave SLLM_AMX out.")
  endif()

  set(kernels "${llama_dir}/ggml/src/ggml-cpu/amx/mmq.cpp")
  if(NOT EXISTS "${kernels}")
    message(FATAL_ERROR "SLLM_AMX is ON, and there are no AMX kernels where they are looked for:\n  ${kernels}\n"
                        "Build the pinned sources (leave SLLM_LLAMA_CPP_SOURCE_DIR and SLLM_USE_SYSTEM_LLAMA out), ${or_without}")
  endif()
  # Each of our patches leaves a line in the file that says it is in. One that the pin no longer needs is dropped, and
  # no longer asked for here.
  file(READ "${kernels}" text)
  set(patches_dir "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../vendor/llama.cpp/patches")
  file(GLOB patches LIST_DIRECTORIES false "${patches_dir}/[0-9][0-9][0-9][0-9]-amx-*.patch")
  set(missing "")
  foreach(patch IN LISTS patches)
    get_filename_component(name "${patch}" NAME_WE)
    string(REGEX REPLACE "^([0-9]+)-(.*)$" "patch \\1 (\\2) is in" marker "${name}")
    string(FIND "${text}" "${marker}" found)
    if(found EQUAL -1)
      string(APPEND missing "  ${name}.patch\n")
    endif()
  endforeach()
  if(missing)
    get_filename_component(patches_dir "${patches_dir}" ABSOLUTE)
    message(FATAL_ERROR "SLLM_AMX is ON, and the llama.cpp in ${llama_dir} has AMX kernels that are not known to be right. "
                        "Unpatched, they give wrong results and write out of bounds where weights are broadcast over a batch "
                        "(qwen35 and lfm2 with two and more sequences), and compiled with GCC 12 and older they die with SIGILL. "
                        "These patches are not in:\n${missing}"
                        "Apply them there (git apply ${patches_dir}/*-amx-*.patch), build the pinned sources, which are patched "
                        "(leave SLLM_LLAMA_CPP_SOURCE_DIR out), ${or_without}")
  endif()

  if(NOT MSVC)  # whose intrinsics need no option
    foreach(extension IN ITEMS tile int8)
      check_cxx_compiler_flag("-mamx-${extension}" SLLM_COMPILER_KNOWS_AMX_${extension})
      if(NOT SLLM_COMPILER_KNOWS_AMX_${extension})
        message(FATAL_ERROR "SLLM_AMX is ON, and ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} (${CMAKE_CXX_COMPILER}) "
                            "does not know -mamx-${extension}. Use GCC 11 or Clang 12 or newer, ${or_without}")
      endif()
    endforeach()
  endif()
endfunction()
