/*
 * cpu.h - what this CPU can do and what this build needs of it.
 *
 * The module sllm._cpu, which is compiled for the oldest CPU of the architecture and holds nothing of llama.cpp, so that it can be
 * loaded, and asked, where the kernels of a build cannot run. sllm/cpu.py decides what follows.
 *
 * Names of features are those of Linux's /proc/cpuinfo, several of them separated by single spaces. All texts are constant and never
 * NULL.
 *
 * Copyright (c) 2026 the sllm authors. MIT licence.
 */
#ifndef SLLM_CPU_H
#define SLLM_CPU_H

/* cffi: begin */

/* The features of this CPU that the operating system lets programs use: CPUID and XCR0 on x86-64, the auxiliary vector on Linux and
 * sysctl on macOS for ARM. "" on other architectures. */
const char * sllm_cpu_features(void);
/* What the CPU calls itself; "" where it does not say. */
const char * sllm_cpu_brand(void);

/* "native": kernels for the CPU of the machine that built it. "portable": several sets of kernels, each a module of its own.
 * "generic": one set of kernels, for the CPU that the build's options name. "system": the machine's own llama.cpp. */
const char * sllm_build_kind(void);
/* Name and version of the C++ compiler. */
const char * sllm_build_compiler(void);
/* Whether kernels that use AMX were compiled. */
int sllm_build_amx(void);
/* The features that the kernels linked into sllm._core need. */
const char * sllm_build_needs(void);
/* The sets of kernels that are modules: "NAME:FEATURE FEATURE,NAME:FEATURE". "" in all other kinds of build. */
const char * sllm_build_variants(void);
/* What the shared libraries of this build have in their names, so that they are nobody else's; "" where there are none. */
const char * sllm_build_tag(void);

/* cffi: end */

#endif /* SLLM_CPU_H */
