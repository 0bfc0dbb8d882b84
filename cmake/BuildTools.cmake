# What a build needs of the machine, looked for before anything is downloaded or compiled, and named as one installs it.

# The headers of the interpreter that builds; `component` is FindPython's name for those that the module needs.
function(sllm_require_python_headers component)
  find_package(Python QUIET COMPONENTS Interpreter)
  set(version "${Python_VERSION}")
  set(short "${Python_VERSION_MAJOR}.${Python_VERSION_MINOR}")
  find_package(Python QUIET COMPONENTS Interpreter ${component})
  if(NOT Python_${component}_FOUND)
    message(FATAL_ERROR
      "The headers of Python ${version} (Python.h), the interpreter at ${Python_EXECUTABLE}, are missing. Install them:\n"
      "  Debian, Ubuntu:  apt install python3-dev   (another version than the system's: python${short}-dev)\n"
      "  Fedora, RHEL:    dnf install python3-devel\n"
      "  macOS:           xcode-select --install   (or an interpreter from python.org or Homebrew, which has them)\n"
      "and run pip again.")
  endif()
endfunction()

# Forgets CC and CXX where they name a program that is not here and are no wish of the user's: the build backend sets them to what
# the interpreter was compiled with, which may have been on another machine. CMake then looks for any compiler.
function(sllm_forget_the_interpreters_compilers)
  find_package(Python QUIET COMPONENTS Interpreter)
  foreach(variable IN ITEMS CC CXX)
    if("$ENV{${variable}}" STREQUAL "")
      continue()
    endif()
    separate_arguments(words UNIX_COMMAND "$ENV{${variable}}")
    list(GET words 0 program)
    find_program(found NAMES "${program}" NO_CACHE)
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_config_var('${variable}'))"
                    OUTPUT_VARIABLE interpreters OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(NOT found AND "$ENV{${variable}}" STREQUAL interpreters)
      unset(ENV{${variable}})
    endif()
    unset(found)
  endforeach()
endfunction()

# A C and a C++ compiler. CMake's own words would be about those variables, which nobody has set.
function(sllm_require_compilers)
  include(CheckLanguage)
  sllm_forget_the_interpreters_compilers()
  foreach(language IN ITEMS C CXX)
    check_language(${language})
    if(NOT CMAKE_${language}_COMPILER)
      set(name "C++")
      set(variable CXX)
      if(language STREQUAL "C")
        set(name "C")
        set(variable CC)
      endif()
      set(asked "")
      if(NOT "$ENV{${variable}}" STREQUAL "")
        set(asked " (tried: $ENV{${variable}})")
      endif()
      message(FATAL_ERROR
        "No ${name} compiler was found${asked}. Install one:\n"
        "  Debian, Ubuntu:  apt install g++\n"
        "  Fedora, RHEL:    dnf install gcc-c++\n"
        "  macOS:           xcode-select --install\n"
        "or say where it is, with the environment variables CC and CXX, and run pip again.")
    endif()
  endforeach()
endfunction()
