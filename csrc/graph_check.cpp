// Whether ggml can compute what a model's file makes of it, found out before it does.
//
// llama.cpp compares the shapes of a file's tensors with its hyperparameters when it loads them, and their types with nothing: that is
// left to ggml's operations, which assert what they were written for, or read what is there as something else, while they compute. With
// several threads that is too late: an assertion on one of ggml's own threads ends the process. So every kind of operation is looked at
// here when a model has been loaded, on the calling thread alone, where an assertion is an exception (status.cpp):
//
//  - By a rule. Weights that an operation takes may have other types than float32 where it is known to tell them apart, and nowhere else.
//  - By trial. It is computed once, with the model's own weights and zeros for everything else.
//
// Both of the graphs that llama.cpp makes of the model: one token, and several.
//
// Before that, while it loads, llama.cpp divides by some hyperparameters without a look at them: by 0, which is no exception in C++ and
// ends the process. Those are looked at first.

#include "internal.hpp"

#include "ggml-backend.h"
#include "gguf.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <set>

namespace {

constexpr int32_t most_tokens = 4;

struct FreeBackend {
    void operator()(ggml_backend * p) const { ggml_backend_free(p); }
};
struct FreeBuffer {
    void operator()(ggml_backend_buffer * p) const { ggml_backend_buffer_free(p); }
};
struct FreeTensors {
    void operator()(ggml_context * p) const { ggml_free(p); }
};

// What is looked at, in the calls of one llama_decode().
struct Check {
    int64_t n_expert = 0;
    std::unique_ptr<ggml_backend, FreeBackend> cpu;
    std::unique_ptr<ggml_backend_buffer, FreeBuffer> zeros; // grows
    std::set<std::string> known;                            // the kinds of operation that have been tried
};

const ggml_tensor & owner_of(const ggml_tensor & tensor) { return tensor.view_src == nullptr ? tensor : *tensor.view_src; }

bool is_weight(const ggml_tensor & tensor) {
    const ggml_backend_buffer_t buffer = owner_of(tensor).buffer;
    return buffer != nullptr && ggml_backend_buffer_get_usage(buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

bool is_host(const ggml_tensor & tensor) {
    const ggml_backend_buffer_t buffer = owner_of(tensor).buffer;
    return buffer != nullptr && ggml_backend_buffer_is_host(buffer);
}

// As one word of a message: "blk.0.attn_norm.weight, bf16 [64, 1, 1, 1]".
std::string described(const ggml_tensor & tensor) {
    std::string text = std::string(owner_of(tensor).name) + ", " + ggml_type_name(tensor.type) + " [";
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        text += (i == 0 ? "" : ", ") + std::to_string(tensor.ne[i]);
    }
    return text + "]";
}

// The operation with the weights that it takes, which are what a file can have got wrong.
std::string described_op(const ggml_tensor & node) {
    std::string text = std::string(ggml_op_desc(&node)) + " (" + node.name + ")";
    const char * joint = " of ";
    for (const ggml_tensor * src : node.src) {
        if (src != nullptr && is_weight(*src)) {
            text += joint + described(*src);
            joint = " and ";
        }
    }
    return text;
}

// ---- the rule

// Matrices: what ggml has numbers for, and products with. The other types are for integers, and for what products make on their way.
bool is_matrix_type(ggml_type type) { return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr; }

// Operations that look at the type of this source, and compute with it or assert that they cannot. All others assert no more than some
// strides, or nothing, and take what is there for float32.
bool tells_types_apart(const ggml_tensor & node, int source) {
    switch (node.op) {
    case GGML_OP_GET_ROWS:
    case GGML_OP_MUL_MAT:
    case GGML_OP_MUL_MAT_ID:
    case GGML_OP_CPY:
    case GGML_OP_CONT:
    case GGML_OP_DUP: return source == 0;
    case GGML_OP_ADD:
    case GGML_OP_SUB:
    case GGML_OP_MUL:
    case GGML_OP_DIV: return true;
    default: return false;
    }
}

// A table in the file that names experts, one row for each token: an index that is none would be used as one.
void check_indices(const Check & check, const ggml_tensor & table) {
    const ggml_tensor & owner = owner_of(table);
    std::vector<int32_t> values(static_cast<size_t>(ggml_nelements(&owner)));
    ggml_backend_tensor_get(&owner, values.data(), 0, values.size() * sizeof(int32_t));
    for (const int32_t value : values) {
        if (value < 0 || value >= check.n_expert) {
            sllm::fail(SLLM_ERR_LOAD, "%s names the expert %d, and there are %lld; the file is damaged", owner.name, value,
                       static_cast<long long>(check.n_expert));
        }
    }
}

void check_types(const Check & check, const ggml_tensor & node) {
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        const ggml_tensor * src = node.src[i];
        if (src == nullptr || !is_weight(*src) || src->type == GGML_TYPE_F32) {
            continue;
        }
        if (node.op == GGML_OP_GET_ROWS && i == 0 && src->type == GGML_TYPE_I32) {
            check_indices(check, *src);
        } else if (!tells_types_apart(node, i) || !is_matrix_type(src->type)) {
            sllm::fail(SLLM_ERR_LOAD, "its tensor %s has a type that %s cannot be computed with; the file is damaged",
                       described(*src).c_str(), ggml_op_desc(&node));
        }
    }
}

// Rotations that ggml never comes to the end of, or divides by 0 in: of no dimensions, and of sections that are none.
void check_rotation(const ggml_tensor & node) {
    const int32_t n_dims = node.op_params[1];
    if (n_dims < 1) {
        sllm::fail(SLLM_ERR_LOAD, "%s rotates %d dimensions: rope.dimension_count is 0, or another number of the kind; the file is damaged",
                   node.name, n_dims);
    }
    if ((node.op_params[2] & GGML_ROPE_TYPE_MROPE) == 0) {
        return;
    }
    int64_t sum = 0;
    for (int i = 11; i < 15; ++i) {
        if (node.op_params[i] < 0) {
            sum = -1;
            break;
        }
        sum += node.op_params[i];
    }
    if (sum < 1 || sum > INT32_MAX) {
        sllm::fail(SLLM_ERR_LOAD, "%s: rope.dimension_sections are not a rotation's; the file is damaged", node.name);
    }
}

// ---- the trial

// What one operation has in common with others of its kind.
std::string kind_of(const ggml_tensor & node) {
    std::string kind(reinterpret_cast<const char *>(node.op_params), sizeof node.op_params);
    const auto add = [&](const ggml_tensor & tensor) {
        kind.append(reinterpret_cast<const char *>(&tensor.type), sizeof tensor.type);
        kind.append(reinterpret_cast<const char *>(tensor.ne), sizeof tensor.ne);
        kind.append(reinterpret_cast<const char *>(tensor.nb), sizeof tensor.nb);
    };
    kind += std::to_string(node.op);
    add(node);
    for (const ggml_tensor * src : node.src) {
        if (src == nullptr) {
            kind += '-';
            continue;
        }
        add(*src);
        const bool weight = is_weight(*src);
        kind += weight ? ggml_backend_buft_name(ggml_backend_buffer_get_type(owner_of(*src).buffer)) : "activation";
    }
    return kind;
}

bool is_computed(const ggml_tensor & node) {
    switch (node.op) {
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
    // llama.cpp's own functions, of what it has made itself
    case GGML_OP_MAP_CUSTOM1:
    case GGML_OP_MAP_CUSTOM2:
    case GGML_OP_MAP_CUSTOM3:
    case GGML_OP_CUSTOM: return false;
    default: return ggml_nelements(&node) > 0;
    }
}

// Memory for copies of tensors, all zeros.
char * zeroed(Check & check, size_t size) {
    if (check.zeros == nullptr || ggml_backend_buffer_get_size(check.zeros.get()) < size) {
        check.zeros.reset(ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size));
        if (check.zeros == nullptr) {
            sllm::fail(SLLM_ERR_NO_MEMORY, "out of memory");
        }
    }
    ggml_backend_buffer_clear(check.zeros.get(), 0);
    return static_cast<char *>(ggml_backend_buffer_get_base(check.zeros.get()));
}

size_t padded_size(const ggml_tensor & tensor) { return (ggml_nbytes(&tensor) + 255) / 256 * 256; }

void compute_once(Check & check, const ggml_tensor & node) {
    size_t size = padded_size(node);
    for (const ggml_tensor * src : node.src) {
        size += src != nullptr && !is_weight(*src) ? padded_size(*src) : 0;
    }
    char * at = zeroed(check, size);
    const auto place = [&](ggml_tensor & copy) {
        copy.view_src = nullptr;
        copy.view_offs = 0;
        copy.extra = nullptr;
        copy.buffer = check.zeros.get();
        copy.data = at;
        at += padded_size(copy);
    };
    std::array<ggml_tensor, GGML_MAX_SRC> sources{};
    ggml_tensor copy = node;
    copy.flags |= GGML_TENSOR_FLAG_COMPUTE;
    place(copy);
    for (size_t i = 0; i < GGML_MAX_SRC; ++i) {
        if (node.src[i] == nullptr || is_weight(*node.src[i])) {
            continue;
        }
        sources[i] = *node.src[i];
        sources[i].op = GGML_OP_NONE;
        std::fill(std::begin(sources[i].src), std::end(sources[i].src), nullptr);
        place(sources[i]);
        copy.src[i] = &sources[i];
    }
    const std::unique_ptr<ggml_context, FreeTensors> tensors(ggml_init({ggml_graph_overhead_custom(1, false), nullptr, true}));
    ggml_cgraph * graph = ggml_new_graph_custom(tensors.get(), 1, false);
    ggml_graph_add_node(graph, &copy);
    const ggml_status status = ggml_backend_graph_compute(check.cpu.get(), graph);
    if (status != GGML_STATUS_SUCCESS) {
        sllm::fail(SLLM_ERR_LOAD, "%s", ggml_status_to_string(status));
    }
}

bool on_node(ggml_tensor * node, bool ask, void * user_data) {
    auto & check = *static_cast<Check *>(user_data);
    if (!ask || !is_computed(*node)) {
        return !ask;
    }
    check_types(check, *node);
    if (node->op == GGML_OP_ROPE) {
        check_rotation(*node);
    }
    // Weights elsewhere are computed with there, by operations that assert on the thread that calls them.
    bool is_here = is_host(*node);
    for (const ggml_tensor * src : node->src) {
        is_here = is_here && (src == nullptr || !is_weight(*src) || is_host(*src) || owner_of(*src).buffer == nullptr);
    }
    if (!is_here || !check.known.insert(kind_of(*node)).second) {
        return false;
    }
    try {
        compute_once(check, *node);
    } catch (const sllm::Error & error) {
        sllm::fail(error.status == SLLM_ERR_NO_MEMORY ? error.status : SLLM_ERR_LOAD, "%s cannot be computed; the file is damaged: %s",
                   described_op(*node).c_str(), error.text.c_str());
    }
    return false;
}

std::unique_ptr<ggml_backend, FreeBackend> one_thread() {
    std::unique_ptr<ggml_backend, FreeBackend> cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (cpu == nullptr) {
        return cpu;
    }
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get()));
    const auto set_n_threads =
        reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"));
    if (set_n_threads == nullptr) {
        cpu.reset();
        return cpu;
    }
    set_n_threads(cpu.get(), 1);
    return cpu;
}

// A llama_decode() of `n` tokens, or of hidden states, that ends before it has computed more than a node.
void decode(const sllm_model & model, llama_context & context, int32_t n, bool with_tokens, bool with_rows) {
    const auto size = static_cast<size_t>(n);
    std::vector<llama_token> token(size, 0);
    std::vector<float> rows(size * static_cast<size_t>(llama_model_n_embd_out(model.model.get())), 0.0F);
    std::vector<llama_pos> pos(4 * size, 0);
    for (size_t i = 0; i < 3 * size; ++i) {
        pos[i] = static_cast<llama_pos>(i % size);
    }
    std::vector<int8_t> outputs(size, 1);
    llama_batch batch{};
    batch.n_tokens = n;
    batch.token = with_tokens ? token.data() : nullptr;
    batch.embd = with_rows ? rows.data() : nullptr;
    batch.pos = pos.data();
    batch.logits = outputs.data();
    const int32_t rc = llama_decode(&context, batch);
    if (rc != 0 && rc != 2) {
        const std::string lines = sllm::Guard::logged_errors();
        sllm::fail(sllm::status_of_lines(lines, SLLM_ERR_LOAD), "llama_decode() returned %d: %s", rc,
                   lines.empty() ? "it did not say why" : lines.c_str());
    }
    llama_memory_clear(llama_get_memory(&context), false);
}

int64_t n_expert_of(const llama_model & model) {
    char architecture[128];
    char text[64];
    if (llama_model_meta_val_str(&model, "general.architecture", architecture, sizeof architecture) < 0 ||
        llama_model_meta_val_str(&model, (std::string(architecture) + ".expert_count").c_str(), text, sizeof text) < 0) {
        return 0;
    }
    return std::strtoll(text, nullptr, 10);
}

// ---- divisors

// What llama.cpp divides by as it stands in the file (src/models/*.cpp, llama-kv-cache-*.cpp); null: whatever the architecture.
struct Divisor {
    const char * architecture;
    const char * name;
    bool required; // not there is 0
};
constexpr Divisor divisors[] = {
    {nullptr, "full_attention_interval", false},
    {nullptr, "ssm.group_count", false},
    {nullptr, "ssm.time_step_rank", false},
    {nullptr, "wkv.head_size", false},
    {"deepseek2", "attention.head_count", true},
    {"deepseek4", "attention.output_group_count", false},
    {"ernie4_5-moe", "interleave_moe_layer_step", false},
    {"grovemoe", "expert_used_count", true},
    {"grovemoe", "experts_per_group", false},
    {"olmo2", "attention.head_count", true},
    {"phimoe", "attention.head_count", true},
    {"qwen4exp", "ple.head_vocab_sizes", false},
};

// The smallest of the integers that stand under a key, 0 where there are none.
int64_t smallest_integer(const gguf_context & file, int64_t key) {
    const gguf_type type = gguf_get_kv_type(&file, key);
    const bool is_array = type == GGUF_TYPE_ARRAY;
    const gguf_type item = is_array ? gguf_get_arr_type(&file, key) : type;
    if (item != GGUF_TYPE_UINT32 && item != GGUF_TYPE_INT32) {
        return 1; // llama.cpp refuses it
    }
    const size_t n = is_array ? gguf_get_arr_n(&file, key) : 1;
    const auto * data = static_cast<const uint32_t *>(is_array ? gguf_get_arr_data(&file, key) : gguf_get_val_data(&file, key));
    int64_t smallest = n == 0 ? 0 : INT64_MAX;
    for (size_t i = 0; i < n; ++i) {
        smallest = std::min(smallest, static_cast<int64_t>(data[i]));
    }
    return smallest;
}

// Recurrent layers of the Qwen3.5 family have tensors that llama.cpp does without when it loads, and not when it makes a graph. Of a file
// that is one of several, the others would have to be asked.
void check_recurrent_layers(const gguf_context & file, const std::string & architecture) {
    if ((architecture != "qwen35" && architecture != "qwen35moe" && architecture != "qwen3next") ||
        gguf_find_key(&file, "split.count") >= 0) {
        return;
    }
    const std::string last = ".ssm_out.weight";
    for (int64_t i = 0; i < gguf_get_n_tensors(&file); ++i) {
        const std::string tensor = gguf_get_tensor_name(&file, i);
        if (tensor.size() <= last.size() || tensor.compare(tensor.size() - last.size(), last.size(), last) != 0) {
            continue;
        }
        const std::string layer = tensor.substr(0, tensor.size() - last.size());
        if (architecture == "qwen3next" && gguf_find_tensor(&file, (layer + ".ssm_in.weight").c_str()) >= 0) {
            continue; // the older form
        }
        for (const char * name : {".attn_qkv.weight", ".attn_gate.weight"}) {
            if (gguf_find_tensor(&file, (layer + name).c_str()) < 0) {
                sllm::fail(SLLM_ERR_LOAD, "its tensor %s%s is missing; the file is damaged", layer.c_str(), name);
            }
        }
    }
}

// ggml's wkv7 (ggml_compute_forward_rwkv_wkv7_f32) goes through each head in steps of as many numbers as the CPU's vectors make it, 64 at
// most, and beyond the head's end where they are no divisor.
void check_wkv_heads(const gguf_context & file, const std::string & architecture) {
    if (architecture != "rwkv7" && architecture != "arwkv7") {
        return;
    }
    const std::string key = architecture + ".wkv.head_size";
    const int64_t at = gguf_find_key(&file, key.c_str());
    const int64_t size = at < 0 ? 0 : smallest_integer(file, at);
    if (size % 64 != 0) {
        sllm::fail(SLLM_ERR_UNSUPPORTED, "%s is %lld, and ggml can compute multiples of 64 alone", key.c_str(),
                   static_cast<long long>(size));
    }
}

} // namespace

namespace sllm {

void check_header(const gguf_context & file) {
    const int64_t name = gguf_find_key(&file, "general.architecture");
    if (name < 0 || gguf_get_kv_type(&file, name) != GGUF_TYPE_STRING) {
        return;
    }
    const std::string architecture = gguf_get_val_str(&file, name);
    check_recurrent_layers(file, architecture);
    for (const Divisor & divisor : divisors) {
        if (divisor.architecture != nullptr && architecture != divisor.architecture) {
            continue;
        }
        const std::string key = architecture + "." + divisor.name;
        const int64_t at = gguf_find_key(&file, key.c_str());
        if (at < 0 ? divisor.required : smallest_integer(file, at) == 0) {
            fail(SLLM_ERR_LOAD, "%s is %s; the file is damaged", key.c_str(), at < 0 ? "not there" : "0");
        }
    }
    check_wkv_heads(file, architecture);
}

void check_graph(const sllm_model & model, bool heads) {
    Check check;
    check.n_expert = n_expert_of(*model.model);
    check.cpu = one_thread();
    if (check.cpu == nullptr) {
        return; // nothing is computed on the CPU
    }
    llama_context_params p = llama_context_default_params();
    p.n_ctx = 256; // what llama.cpp makes of less
    p.n_batch = p.n_ubatch = p.n_outputs_max = most_tokens;
    p.n_seq_max = 1;
    p.n_threads = p.n_threads_batch = 1;
    p.swa_full = true;
    p.no_perf = true;
#ifndef SLLM_NO_MTP
    p.ctx_type = heads ? LLAMA_CONTEXT_TYPE_MTP : p.ctx_type;
#endif
    p.abort_callback = [](void *) { return true; };
    p.cb_eval = on_node;
    p.cb_eval_user_data = &check;
    std::unique_ptr<llama_context, Free> context;
    try {
        context.reset(llama_init_from_model(model.model.get(), p));
    } catch (const Error & error) {
        throw Error(SLLM_ERR_LOAD, error.text);
    }
    if (context == nullptr) {
        const std::string lines = Guard::logged_errors();
        fail(status_of_lines(lines, SLLM_ERR_LOAD), "llama.cpp made no context of it: %s",
             lines.empty() ? "it did not say why" : lines.c_str());
    }
    if (llama_get_memory(context.get()) == nullptr) {
        return; // what there can be no contexts of
    }
    const bool rows = model.is_layers && model.input.empty();
    for (const int32_t n : {1, most_tokens}) {
        try {
            decode(model, *context, n, !rows || heads, rows || heads);
        } catch (const Error & error) {
            throw Error(error.status == SLLM_ERR_INTERNAL ? SLLM_ERR_LOAD : error.status, error.text);
        }
    }
}

} // namespace sllm
