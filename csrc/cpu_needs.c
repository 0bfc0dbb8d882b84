/*
 * The CPU features that ggml's kernels were compiled for, which the compiler's macros tell.
 *
 * This file gets the kernels' own instruction-set flags (CMakeLists.txt) and holds no code, so it can be part of a module that runs on
 * any CPU. What a compiler uses only where the source asks for it by name (AES, SHA, RDRAND, SSE4a and the like) is left out.
 */
extern const char sllm_kernel_needs[];

const char sllm_kernel_needs[] = ""
#ifdef __SSE3__
                                 " sse3"
#endif
#ifdef __SSSE3__
                                 " ssse3"
#endif
#ifdef __SSE4_1__
                                 " sse4_1"
#endif
#ifdef __SSE4_2__
                                 " sse4_2"
#endif
#ifdef __POPCNT__
                                 " popcnt"
#endif
#ifdef __LZCNT__
                                 " abm"
#endif
#ifdef __MOVBE__
                                 " movbe"
#endif
#ifdef __BMI__
                                 " bmi1"
#endif
#ifdef __BMI2__
                                 " bmi2"
#endif
#ifdef __AVX__
                                 " avx"
#endif
#ifdef __F16C__
                                 " f16c"
#endif
#ifdef __FMA__
                                 " fma"
#endif
#ifdef __FMA4__
                                 " fma4"
#endif
#ifdef __XOP__
                                 " xop"
#endif
#ifdef __AVX2__
                                 " avx2"
#endif
#ifdef __AVXVNNI__
                                 " avx_vnni"
#endif
#ifdef __AVXVNNIINT8__
                                 " avx_vnni_int8"
#endif
#ifdef __AVX512F__
                                 " avx512f"
#endif
#ifdef __AVX512CD__
                                 " avx512cd"
#endif
#ifdef __AVX512VL__
                                 " avx512vl"
#endif
#ifdef __AVX512DQ__
                                 " avx512dq"
#endif
#ifdef __AVX512BW__
                                 " avx512bw"
#endif
#ifdef __AVX512VBMI__
                                 " avx512vbmi"
#endif
#ifdef __AVX512VNNI__
                                 " avx512_vnni"
#endif
#ifdef __AVX512BF16__
                                 " avx512_bf16"
#endif
#ifdef __AVX512FP16__
                                 " avx512_fp16"
#endif
#ifdef __GFNI__
                                 " gfni"
#endif
#ifdef __AMX_TILE__
                                 " amx_tile"
#endif
#ifdef __AMX_INT8__
                                 " amx_int8"
#endif
#ifdef __AMX_BF16__
                                 " amx_bf16"
#endif
#ifdef __ARM_FEATURE_DOTPROD
                                 " asimddp"
#endif
#ifdef __ARM_FEATURE_FP16_VECTOR_ARITHMETIC
                                 " asimdhp"
#endif
#ifdef __ARM_FEATURE_MATMUL_INT8
                                 " i8mm"
#endif
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
                                 " bf16"
#endif
#ifdef __ARM_FEATURE_SVE
                                 " sve"
#endif
#ifdef __ARM_FEATURE_SVE2
                                 " sve2"
#endif
#ifdef __ARM_FEATURE_SME
                                 " sme"
#endif
    ;
