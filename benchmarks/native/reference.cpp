// The floor under every call of sllm: the bare llama_decode() of one batch, timed where it is called.
//
// llama-bench times whole runs in a process of its own; a difference of a few microseconds a pass drowns in what changes
// between two processes. This library is loaded into the benchmark's own process, so that its passes and sllm's can take
// turns.

#include "llama.h"

#include "ggml.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <memory>
#include <vector>

namespace {

struct Free {
    void operator()(llama_model * p) const { llama_model_free(p); }
    void operator()(llama_context * p) const { llama_free(p); }
};

struct Reference {
    std::unique_ptr<llama_model, Free> model; // before `context`, which is freed first
    std::unique_ptr<llama_context, Free> context;
    std::vector<llama_pos> pos;
    std::vector<int32_t> n_seq_id;
    std::vector<llama_seq_id> seq_id;
    std::vector<llama_seq_id *> seq_ids;
    std::vector<int8_t> logits;
};

int64_t thread_nanoseconds() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return int64_t{now.tv_sec} * 1000000000 + now.tv_nsec;
}

ggml_type type_by_name(const char * name) {
    for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
        if (std::strcmp(name, ggml_type_name(type)) == 0) {
            return type;
        }
    }
    return GGML_TYPE_COUNT;
}

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void * reference_open(const char * path, int32_t n_ctx, int32_t n_threads, const char * type_kv) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    auto r = std::make_unique<Reference>();
    r->model.reset(llama_model_load_from_file(path, llama_model_default_params()));
    if (r->model == nullptr || type_by_name(type_kv) == GGML_TYPE_COUNT) {
        return nullptr;
    }
    llama_context_params p = llama_context_default_params();
    p.n_ctx = static_cast<uint32_t>(n_ctx);
    p.n_threads = n_threads;
    p.n_threads_batch = n_threads;
    p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    p.type_k = type_by_name(type_kv);
    p.type_v = p.type_k;
    p.no_perf = true;
    r->context.reset(llama_init_from_model(r->model.get(), p));
    return r->context == nullptr ? nullptr : r.release();
}

EXPORT void reference_close(void * reference) { delete static_cast<Reference *>(reference); }

// Decode `n_tokens` tokens at `pos`, with logits for each, in one pass; what the memory held from there on goes. `argmax`
// receives the likeliest token behind each. Returns the nanoseconds that this thread spent in llama_decode() and
// llama_synchronize() alone, or -1.
EXPORT int64_t reference_pass(void * reference, const int32_t * tokens, int32_t n_tokens, int32_t pos, int32_t * argmax) {
    auto & r = *static_cast<Reference *>(reference);
    const auto n = static_cast<size_t>(n_tokens);
    llama_context * context = r.context.get();
    llama_memory_seq_rm(llama_get_memory(context), 0, pos, -1);
    r.pos.resize(n);
    r.n_seq_id.assign(n, 1);
    r.seq_id.assign(n, 0);
    r.seq_ids.resize(n);
    r.logits.assign(n, 1);
    for (size_t i = 0; i < n; ++i) {
        r.pos[i] = pos + static_cast<llama_pos>(i);
        r.seq_ids[i] = &r.seq_id[i];
    }
    llama_batch batch{};
    batch.n_tokens = n_tokens;
    batch.token = const_cast<int32_t *>(tokens);
    batch.pos = r.pos.data();
    batch.n_seq_id = r.n_seq_id.data();
    batch.seq_id = r.seq_ids.data();
    batch.logits = r.logits.data();

    const int64_t before = thread_nanoseconds();
    const int32_t rc = llama_decode(context, batch);
    llama_synchronize(context);
    const int64_t after = thread_nanoseconds();
    if (rc != 0) {
        return -1;
    }
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(r.model.get()));
    const float * row = llama_get_logits(context);
    for (size_t i = 0; i < n; ++i, row += n_vocab) {
        argmax[i] = static_cast<int32_t>(std::max_element(row, row + n_vocab) - row);
    }
    return after - before;
}
