/* What this CPU can do: see cpu.h. Compiled without any instruction-set flag of the build's. */
#include "cpu.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

extern const char sllm_kernel_needs[]; /* cpu_needs.c */

static char feature_text[1024];

static void add_feature(const char * name) {
    const size_t used = strlen(feature_text);
    snprintf(feature_text + used, sizeof feature_text - used, used == 0 ? "%s" : " %s", name);
}

#if defined(__x86_64__)

enum leaf { LEAF_1_C, LEAF_1_D, LEAF_7_B, LEAF_7_C, LEAF_7_D, LEAF_7_1_A, LEAF_7_1_D, LEAF_EXT_C, N_LEAVES };

/* What the operating system saves when it switches threads, as bits of XCR0: without these, the instructions fault. */
enum state { STATE_NONE = 0, STATE_AVX = 0x6, STATE_AVX512 = 0xe6, STATE_AMX = 0x60000 };

static const struct {
    const char * name;
    enum leaf leaf;
    int bit;
    enum state state;
} known_features[] = {
    {"sse2", LEAF_1_D, 26, STATE_NONE},
    {"sse3", LEAF_1_C, 0, STATE_NONE},
    {"ssse3", LEAF_1_C, 9, STATE_NONE},
    {"sse4_1", LEAF_1_C, 19, STATE_NONE},
    {"sse4_2", LEAF_1_C, 20, STATE_NONE},
    {"popcnt", LEAF_1_C, 23, STATE_NONE},
    {"abm", LEAF_EXT_C, 5, STATE_NONE},
    {"movbe", LEAF_1_C, 22, STATE_NONE},
    {"bmi1", LEAF_7_B, 3, STATE_NONE},
    {"bmi2", LEAF_7_B, 8, STATE_NONE},
    {"avx", LEAF_1_C, 28, STATE_AVX},
    {"f16c", LEAF_1_C, 29, STATE_AVX},
    {"fma", LEAF_1_C, 12, STATE_AVX},
    {"fma4", LEAF_EXT_C, 16, STATE_AVX},
    {"xop", LEAF_EXT_C, 11, STATE_AVX},
    {"avx2", LEAF_7_B, 5, STATE_AVX},
    {"avx_vnni", LEAF_7_1_A, 4, STATE_AVX},
    {"avx_vnni_int8", LEAF_7_1_D, 4, STATE_AVX},
    {"gfni", LEAF_7_C, 8, STATE_NONE},
    {"avx512f", LEAF_7_B, 16, STATE_AVX512},
    {"avx512cd", LEAF_7_B, 28, STATE_AVX512},
    {"avx512vl", LEAF_7_B, 31, STATE_AVX512},
    {"avx512dq", LEAF_7_B, 17, STATE_AVX512},
    {"avx512bw", LEAF_7_B, 30, STATE_AVX512},
    {"avx512vbmi", LEAF_7_C, 1, STATE_AVX512},
    {"avx512_vnni", LEAF_7_C, 11, STATE_AVX512},
    {"avx512_bf16", LEAF_7_1_A, 5, STATE_AVX512},
    {"avx512_fp16", LEAF_7_D, 23, STATE_AVX512},
    {"amx_tile", LEAF_7_D, 24, STATE_AMX},
    {"amx_int8", LEAF_7_D, 25, STATE_AMX},
    {"amx_bf16", LEAF_7_D, 22, STATE_AMX},
};

static uint64_t saved_state(void) {
    uint32_t low = 0;
    uint32_t high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

const char * sllm_cpu_features(void) {
    uint32_t leaves[N_LEAVES] = {0};
    uint32_t a = 0;
    uint32_t b = 0;
    uint32_t c = 0;
    uint32_t d = 0;
    uint64_t saved = 0;
    size_t i;

    if (feature_text[0] != '\0') {
        return feature_text;
    }
    if (__get_cpuid(1, &a, &b, &c, &d)) {
        leaves[LEAF_1_C] = c;
        leaves[LEAF_1_D] = d;
        if ((c & (1U << 27)) != 0) { /* OSXSAVE: xgetbv may be used */
            saved = saved_state();
        }
    }
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        const uint32_t last = a;
        leaves[LEAF_7_B] = b;
        leaves[LEAF_7_C] = c;
        leaves[LEAF_7_D] = d;
        if (last >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
            leaves[LEAF_7_1_A] = a;
            leaves[LEAF_7_1_D] = d;
        }
    }
    if (__get_cpuid(0x80000001U, &a, &b, &c, &d)) {
        leaves[LEAF_EXT_C] = c;
    }
#ifdef __APPLE__
    saved |= STATE_AVX512; /* macOS turns that state on at a thread's first use of it */
#endif
    for (i = 0; i < sizeof known_features / sizeof known_features[0]; ++i) {
        const uint64_t state = known_features[i].state;
        if ((leaves[known_features[i].leaf] >> known_features[i].bit & 1) != 0 && (saved & state) == state) {
            add_feature(known_features[i].name);
        }
    }
    return feature_text;
}

const char * sllm_cpu_brand(void) {
    static char text[49];
    uint32_t words[12] = {0};
    uint32_t i;
    size_t begin;

    for (i = 0; i < 3; ++i) {
        if (!__get_cpuid(0x80000002U + i, &words[4 * i], &words[4 * i + 1], &words[4 * i + 2], &words[4 * i + 3])) {
            return "";
        }
    }
    memcpy(text, words, sizeof words);
    text[sizeof words] = '\0';
    for (begin = strlen(text); begin > 0 && text[begin - 1] == ' '; --begin) {
        text[begin - 1] = '\0';
    }
    return text + strspn(text, " ");
}

#elif defined(__aarch64__) && defined(__linux__)

const char * sllm_cpu_features(void) {
    /* Bits of asm/hwcap.h, by number: an old header does not know the newer ones. */
    static const struct {
        const char * name;
        unsigned long vector;
        int bit;
    } known_features[] = {
        {"asimdhp", AT_HWCAP, 10}, {"asimddp", AT_HWCAP, 20}, {"sve", AT_HWCAP, 22},  {"sve2", AT_HWCAP2, 1},
        {"i8mm", AT_HWCAP2, 13},   {"bf16", AT_HWCAP2, 14},   {"sme", AT_HWCAP2, 23},
    };
    size_t i;

    if (feature_text[0] == '\0') {
        add_feature("asimd"); /* every 64-bit ARM has it */
        for (i = 0; i < sizeof known_features / sizeof known_features[0]; ++i) {
            if ((getauxval(known_features[i].vector) >> known_features[i].bit & 1) != 0) {
                add_feature(known_features[i].name);
            }
        }
    }
    return feature_text;
}

const char * sllm_cpu_brand(void) { return ""; }

#elif defined(__aarch64__) && defined(__APPLE__)

const char * sllm_cpu_features(void) {
    static const struct {
        const char * name;
        const char * key;
    } known_features[] = {
        {"asimdhp", "hw.optional.arm.FEAT_FP16"}, {"asimddp", "hw.optional.arm.FEAT_DotProd"}, {"i8mm", "hw.optional.arm.FEAT_I8MM"},
        {"bf16", "hw.optional.arm.FEAT_BF16"},    {"sme", "hw.optional.arm.FEAT_SME"},
    };
    size_t i;

    if (feature_text[0] == '\0') {
        add_feature("asimd"); /* every 64-bit ARM has it */
        for (i = 0; i < sizeof known_features / sizeof known_features[0]; ++i) {
            int value = 0;
            size_t size = sizeof value;
            if (sysctlbyname(known_features[i].key, &value, &size, NULL, 0) == 0 && value != 0) {
                add_feature(known_features[i].name);
            }
        }
    }
    return feature_text;
}

const char * sllm_cpu_brand(void) {
    static char text[128];
    size_t size = sizeof text - 1;
    return sysctlbyname("machdep.cpu.brand_string", text, &size, NULL, 0) == 0 ? text : "";
}

#else

const char * sllm_cpu_features(void) {
    (void)add_feature;
    return feature_text;
}

const char * sllm_cpu_brand(void) { return ""; }

#endif

const char * sllm_build_kind(void) { return SLLM_BUILD_KIND; }

const char * sllm_build_compiler(void) { return SLLM_BUILD_COMPILER; }

int sllm_build_amx(void) { return SLLM_BUILD_AMX; }

const char * sllm_build_needs(void) { return sllm_kernel_needs[0] == ' ' ? sllm_kernel_needs + 1 : sllm_kernel_needs; }

const char * sllm_build_variants(void) { return SLLM_BUILD_VARIANTS; }

const char * sllm_build_tag(void) { return SLLM_BUILD_TAG; }
