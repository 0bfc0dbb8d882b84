// Devices, models and vocabularies.

#include "internal.hpp"
#include "layers.hpp"

#include "ggml-backend.h"
#include "gguf.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace {

void copy_field(char * field, size_t size, const char * text) {
    std::strncpy(field, text == nullptr ? "" : text, size - 1);
    field[size - 1] = '\0';
}

struct Progress {
    sllm_progress_callback callback;
    void * user_data;
    bool stopped;
};

bool on_progress(float progress, void * user_data) {
    auto & state = *static_cast<Progress *>(user_data);
    if (sllm::shutting_down()) {
        state.stopped = true;
        return false;
    }
    if (state.callback != nullptr && state.callback(progress, state.user_data) == 0) {
        state.stopped = true;
        return false;
    }
    return true;
}

llama_load_mode load_mode(bool use_mmap, bool use_mlock) {
    if (use_mmap) {
        return use_mlock ? LLAMA_LOAD_MODE_MMAP_MLOCK : LLAMA_LOAD_MODE_MMAP;
    }
    return use_mlock ? LLAMA_LOAD_MODE_MLOCK : LLAMA_LOAD_MODE_NONE;
}

llama_split_mode split_mode(int32_t mode) {
    switch (mode) {
    case 0: return LLAMA_SPLIT_MODE_NONE;
    case 1: return LLAMA_SPLIT_MODE_LAYER;
    case 2: return LLAMA_SPLIT_MODE_ROW;
    default: sllm::fail(SLLM_ERR_INVALID, "split_mode is %d, not 0, 1 or 2", mode);
    }
}

// llama.cpp's text getters return the length that snprintf() would, and -1 for "no such thing".
template <class Get> int32_t get_text(char * text, int32_t size, Get && get) {
    char unused[1];
    if (text == nullptr || size < 1) {
        return get(unused, sizeof unused);
    }
    return get(text, static_cast<size_t>(size));
}

// What llama.cpp takes and cannot compute with: it asserts in a thread of ggml's, where nothing can be caught, that an epsilon is not
// negative or NaN.
void check_numbers(const llama_model & model) {
    char text[128];
    if (llama_model_meta_val_str(&model, "general.architecture", text, sizeof text) < 0) {
        return;
    }
    const std::string architecture = text;
    for (const char * name : {".attention.layer_norm_rms_epsilon", ".attention.layer_norm_epsilon"}) {
        const std::string key = architecture + name;
        if (llama_model_meta_val_str(&model, key.c_str(), text, sizeof text) < 0) {
            continue;
        }
        const double epsilon = std::strtod(text, nullptr);
        if (!std::isfinite(epsilon) || epsilon < 0) {
            sllm::fail(SLLM_ERR_LOAD, "%s is %s, not a finite number >= 0; the file is damaged", key.c_str(), text);
        }
    }
    // Rotating none of the dimensions is an endless loop in ggml.
    const std::string key = architecture + ".rope.dimension_count";
    const bool rotates = llama_model_rope_type(&model) != LLAMA_ROPE_TYPE_NONE;
    if (rotates && llama_model_meta_val_str(&model, key.c_str(), text, sizeof text) >= 0 && std::strtol(text, nullptr, 10) == 0) {
        sllm::fail(SLLM_ERR_LOAD, "%s is 0; the file is damaged", key.c_str());
    }
}

struct FreeGGUF {
    void operator()(gguf_context * p) const { gguf_free(p); }
};

// The files that a model is in: llama.cpp finds the others by the name of the first.
std::vector<std::string> parts_of(const char * path, const gguf_context & first) {
    const int64_t key = gguf_find_key(&first, "split.count");
    const int count = key >= 0 && gguf_get_kv_type(&first, key) == GGUF_TYPE_UINT16 ? gguf_get_val_u16(&first, key) : 1;
    std::vector<char> prefix(std::strlen(path) + 1);
    std::vector<std::string> parts{path};
    if (count < 2 || llama_split_prefix(prefix.data(), prefix.size(), path, 0, count) <= 0) {
        return parts;
    }
    for (int i = 1; i < count; ++i) {
        std::vector<char> part(prefix.size() + 32);
        llama_split_path(part.data(), part.size(), prefix.data(), i, count);
        parts.emplace_back(part.data());
    }
    return parts;
}

// How many heads for multi-token prediction the file at `path` has: hyperparameters alone do not say it, since they are often left out
// when a file is made. Refuses a file that has nothing else, with which llama.cpp crashes, and other drafts that are no models.
int32_t count_heads(const char * path) {
    std::unique_ptr<gguf_context, FreeGGUF> file;
    try {
        file.reset(gguf_init_from_file(path, {true, nullptr}));
    } catch (const sllm::Error & error) {
        throw sllm::Error(SLLM_ERR_LOAD, error.text);
    }
    if (file == nullptr) {
        const std::string lines = sllm::Guard::logged_errors();
        throw sllm::Error(SLLM_ERR_LOAD, lines.empty() ? "it is no GGUF file that llama.cpp can read" : lines);
    }
    const int64_t name = gguf_find_key(file.get(), "general.architecture");
    if (name < 0 || gguf_get_kv_type(file.get(), name) != GGUF_TYPE_STRING) {
        return 0; // llama.cpp will say what is wrong
    }
    const std::string architecture = gguf_get_val_str(file.get(), name);
    for (const char * draft : {"dflash", "eagle3", "gemma4-assistant"}) {
        if (architecture == draft) {
            sllm::fail(
                SLLM_ERR_UNSUPPORTED,
                "it is a draft that reads another model's hidden states (%s), which is not supported: use a small model with the same "
                "vocabulary, or a file with MTP heads",
                draft);
        }
    }
    const std::string key = architecture + ".nextn_predict_layers";
    if (gguf_find_key(file.get(), key.c_str()) < 0) {
        return 0;
    }
    int32_t n = 0;
    bool has_layers = false;
    for (const std::string & part : parts_of(path, *file)) {
        if (part != path) {
            file.reset(gguf_init_from_file(part.c_str(), {true, nullptr}));
        }
        for (int64_t i = 0; file != nullptr && i < gguf_get_n_tensors(file.get()); ++i) {
            const std::string tensor = gguf_get_tensor_name(file.get(), i);
            n += tensor.find(".nextn.eh_proj.weight") != std::string::npos ? 1 : 0;
            has_layers = has_layers || tensor == "blk.0.attn_norm.weight";
        }
    }
    if (n > 0 && !has_layers) {
        sllm::fail(SLLM_ERR_LOAD, "it holds a model's MTP heads without the model; load a file that has both");
    }
    return n;
}

// llama.cpp tells which architectures have snapshots by a context alone (llama_n_rs_seq): these, by llm_arch_supports_rs_rollback().
sllm::Rollback rollback_of(const llama_model & model) {
    if (!llama_model_is_recurrent(&model) && !llama_model_is_hybrid(&model)) {
        return sllm::Rollback::any;
    }
    char architecture[64];
    if (llama_model_meta_val_str(&model, "general.architecture", architecture, sizeof architecture) >= 0) {
        for (const char * name : {"bailingmoe3", "deepseek4", "glm5-next", "kimi-k3", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe",
                                  "qwen35", "qwen35moe", "qwen4exp"}) {
            if (std::strcmp(architecture, name) == 0) {
                return sllm::Rollback::snapshots;
            }
        }
    }
    return sllm::Rollback::checkpoints;
}

std::unique_ptr<sllm_model> load(const sllm_model_params & params) {
    const bool is_layers = params.header != nullptr;
    if (params.path == nullptr && !is_layers) {
        sllm::fail(SLLM_ERR_INVALID, "no path given");
    }
    llama_model_params p = llama_model_default_params();

    std::vector<ggml_backend_dev_t> devices;
    if (params.devices != nullptr) {
        for (int32_t i = 0; i < params.n_devices; ++i) {
            devices.push_back(sllm::device_at(params.devices[i]));
        }
        devices.push_back(nullptr);
        p.devices = devices.data();
    }

    std::vector<float> tensor_split(llama_max_devices(), 0.0F);
    if (params.tensor_split != nullptr) {
        if (params.n_tensor_split < 0 || static_cast<size_t>(params.n_tensor_split) > tensor_split.size()) {
            sllm::fail(SLLM_ERR_INVALID, "tensor_split has %d proportions, and this build takes at most %zu", params.n_tensor_split,
                       tensor_split.size());
        }
        float sum = 0;
        for (int32_t i = 0; i < params.n_tensor_split; ++i) {
            const float part = params.tensor_split[i];
            if (!std::isfinite(part) || part < 0) {
                sllm::fail(SLLM_ERR_INVALID, "tensor_split[%d] is %g, not a proportion >= 0", i, static_cast<double>(part));
            }
            tensor_split[static_cast<size_t>(i)] = part;
            sum += part;
        }
        if (sum <= 0) {
            sllm::fail(SLLM_ERR_INVALID, "tensor_split holds nothing but zeros");
        }
        p.tensor_split = tensor_split.data();
    }

    Progress progress{params.progress, params.progress_user_data, false};
    p.n_gpu_layers = params.n_gpu_layers;
    p.split_mode = split_mode(params.split_mode);
    p.main_gpu = params.main_gpu;
    p.load_mode = load_mode(params.use_mmap != 0 && !is_layers, params.use_mlock != 0);
    p.check_tensors = params.check_tensors != 0;
    p.vocab_only = params.vocab_only != 0;
    p.progress_callback = on_progress;
    p.progress_callback_user_data = &progress;

    auto model = std::make_unique<sllm_model>();
    if (!is_layers && params.vocab_only == 0) {
        const int32_t n_heads = count_heads(params.path);
#ifndef SLLM_NO_MTP
        model->n_mtp = params.load_mtp != 0 ? n_heads : 0;
        p.load_mtp = model->n_mtp > 0;
#else
        static_cast<void>(n_heads);
#endif
    }
    try {
        model->model.reset(is_layers ? sllm::load_layers(params, p) : llama_model_load_from_file(params.path, p),
                           [](llama_model * m) { llama_model_free(m); });
    } catch (const sllm::Error & error) {
        throw sllm::Error(SLLM_ERR_LOAD, error.text);
    }
    if (progress.stopped) {
        sllm::fail(SLLM_ERR_INTERRUPTED, "the load was stopped by its progress callback");
    }
    if (model->model == nullptr) {
        const std::string lines = sllm::Guard::logged_errors();
        throw sllm::Error(SLLM_ERR_LOAD, lines.empty() ? "llama.cpp could not load it and did not say why" : lines);
    }
    if (llama_model_has_encoder(model->model.get()) || !llama_model_has_decoder(model->model.get())) {
        sllm::fail(SLLM_ERR_UNSUPPORTED, "it has an encoder; sllm runs decoder-only models");
    }
    if (llama_model_is_diffusion(model->model.get())) {
        sllm::fail(SLLM_ERR_UNSUPPORTED, "it is a diffusion model, which does not write token by token");
    }
    check_numbers(*model->model);
    model->vocab = llama_model_get_vocab(model->model.get());
    model->n_vocab = llama_vocab_n_tokens(model->vocab);
    model->is_layers = is_layers;
    model->has_output = !is_layers || params.has_output != 0;
    model->input = is_layers && params.input != nullptr ? params.input : "";
    model->layer_output = is_layers && params.layer_output != nullptr ? params.layer_output : "";
    if (params.vocabulary != nullptr) {
        if (params.vocabulary->n_vocab != model->n_vocab) {
            sllm::fail(SLLM_ERR_LOAD, "its output has %d rows, and its vocabulary %d tokens", model->n_vocab, params.vocabulary->n_vocab);
        }
        model->vocabulary = params.vocabulary->model;
        model->vocab = params.vocabulary->vocab;
    }
    model->vocab_only = params.vocab_only != 0;
    model->rollback = rollback_of(*model->model);
    return model;
}

void check_vocab(const sllm_model & model) {
    if (llama_vocab_type(model.vocab) == LLAMA_VOCAB_TYPE_NONE) {
        sllm::fail(SLLM_ERR_UNSUPPORTED, "the model file holds no vocabulary");
    }
}

} // namespace

extern "C" {

int32_t sllm_device_count(void) {
    try {
        const sllm::Guard guard;
        return static_cast<int32_t>(ggml_backend_dev_count());
    } catch (...) {
        return 0;
    }
}

int sllm_device_get(int32_t index, struct sllm_device_info * info) {
    return sllm::guarded([&] {
        if (index < 0 || index >= sllm_device_count()) {
            sllm::fail(SLLM_ERR_INVALID, "there is no device %d", index);
        }
        ggml_backend_dev_t device = ggml_backend_dev_get(static_cast<size_t>(index));
        copy_field(info->name, sizeof info->name, ggml_backend_dev_name(device));
        copy_field(info->description, sizeof info->description, ggml_backend_dev_description(device));
        switch (ggml_backend_dev_type(device)) {
        case GGML_BACKEND_DEVICE_TYPE_CPU: info->type = 0; break;
        case GGML_BACKEND_DEVICE_TYPE_GPU: info->type = 1; break;
        case GGML_BACKEND_DEVICE_TYPE_IGPU: info->type = 2; break;
        case GGML_BACKEND_DEVICE_TYPE_ACCEL: info->type = 3; break;
        default: info->type = 4; break;
        }
        size_t free = 0;
        size_t total = 0;
        ggml_backend_dev_memory(device, &free, &total);
        info->memory_free = free;
        info->memory_total = total;
    });
}

int sllm_model_load(const struct sllm_model_params * params, sllm_model ** out) {
    *out = nullptr;
    return sllm::guarded([&] { *out = load(*params).release(); });
}

void sllm_model_free(sllm_model * model) {
    sllm::guarded([&] { delete model; });
}

void sllm_model_get_info(const sllm_model * model, struct sllm_model_info * info) {
    const llama_model * m = model->model.get();
    *info = {};
    info->n_layer = llama_model_n_layer(m);
    info->n_embd = llama_model_n_embd(m);
    if (info->n_layer > 0) { // none is known of a vocabulary alone, and llama.cpp would assert
        info->n_head = llama_model_n_head(m);
        info->n_head_kv = llama_model_n_head_kv(m);
    }
    info->n_ctx_train = llama_model_n_ctx_train(m);
    info->n_swa = llama_model_n_swa(m);
    info->n_vocab = model->n_vocab;
    info->vocab_type = llama_vocab_type(model->vocab);
    info->bos = llama_vocab_bos(model->vocab);
    info->eos = llama_vocab_eos(model->vocab);
    info->eot = llama_vocab_eot(model->vocab);
    info->pad = llama_vocab_pad(model->vocab);
    info->add_bos = llama_vocab_get_add_bos(model->vocab) ? 1 : 0;
    info->add_eos = llama_vocab_get_add_eos(model->vocab) ? 1 : 0;
    info->n_mtp = model->n_mtp;
    info->rollback = static_cast<int32_t>(model->rollback);
    info->size_bytes = llama_model_size(m);
    info->n_params = llama_model_n_params(m);
}

int32_t sllm_model_desc(const sllm_model * model, char * text, int32_t size) {
    return get_text(text, size, [&](char * t, size_t s) { return llama_model_desc(model->model.get(), t, s); });
}

int32_t sllm_model_meta_count(const sllm_model * model) { return llama_model_meta_count(model->model.get()); }

int32_t sllm_model_meta_key(const sllm_model * model, int32_t index, char * text, int32_t size) {
    return get_text(text, size, [&](char * t, size_t s) { return llama_model_meta_key_by_index(model->model.get(), index, t, s); });
}

int32_t sllm_model_meta_value(const sllm_model * model, int32_t index, char * text, int32_t size) {
    return get_text(text, size, [&](char * t, size_t s) { return llama_model_meta_val_str_by_index(model->model.get(), index, t, s); });
}

int32_t sllm_model_chat_template(const sllm_model * model, const char * name, char * text, int32_t size) {
    const char * found = llama_model_chat_template(model->model.get(), name);
    return found == nullptr ? -1 : sllm::copy_text(found, text, size);
}

int sllm_tokenize(const sllm_model * model, const char * text, int32_t size, int32_t add_special, int32_t parse_special, int32_t * tokens,
                  int32_t capacity, int32_t * n_tokens) {
    return sllm::guarded([&] {
        check_vocab(*model);
        const int32_t n = llama_tokenize(model->vocab, text, size, tokens, capacity, add_special != 0, parse_special != 0);
        if (n == std::numeric_limits<int32_t>::min()) {
            sllm::fail(SLLM_ERR_INVALID, "the text makes more than 2^31 tokens");
        }
        *n_tokens = n < 0 ? -n : n;
    });
}

int sllm_token_piece(const sllm_model * model, int32_t token, int32_t special, char * bytes, int32_t capacity, int32_t * n_bytes) {
    return sllm::guarded([&] {
        check_vocab(*model);
        if (token < 0 || token >= model->n_vocab) {
            sllm::fail(SLLM_ERR_INVALID, "token %d is not in the vocabulary of %d tokens", token, model->n_vocab);
        }
        const int32_t n = llama_token_to_piece(model->vocab, token, bytes, capacity, 0, special != 0);
        *n_bytes = n < 0 ? -n : n;
    });
}

int32_t sllm_token_attr(const sllm_model * model, int32_t token) {
    if (token < 0 || token >= model->n_vocab || llama_vocab_type(model->vocab) == LLAMA_VOCAB_TYPE_NONE) {
        return -1;
    }
    const int attr = llama_vocab_get_attr(model->vocab, token);
    int32_t bits = 0;
    bits |= (attr & LLAMA_TOKEN_ATTR_CONTROL) != 0 ? 1 : 0;
    bits |= llama_vocab_is_eog(model->vocab, token) ? 2 : 0;
    bits |= (attr & LLAMA_TOKEN_ATTR_BYTE) != 0 ? 4 : 0;
    bits |= (attr & LLAMA_TOKEN_ATTR_USER_DEFINED) != 0 ? 8 : 0;
    bits |= (attr & LLAMA_TOKEN_ATTR_UNUSED) != 0 ? 16 : 0;
    bits |= (attr & LLAMA_TOKEN_ATTR_UNKNOWN) != 0 ? 32 : 0;
    return bits;
}

int sllm_detokenize(const sllm_model * model, const int32_t * tokens, int32_t n_tokens, int32_t special, char * bytes, int32_t capacity,
                    int32_t * n_bytes) {
    return sllm::guarded([&] {
        check_vocab(*model);
        for (int32_t i = 0; i < n_tokens; ++i) {
            if (tokens[i] < 0 || tokens[i] >= model->n_vocab) {
                sllm::fail(SLLM_ERR_INVALID, "token %d is not in the vocabulary of %d tokens", tokens[i], model->n_vocab);
            }
        }
        const int32_t n = llama_detokenize(model->vocab, tokens, n_tokens, bytes, capacity, false, special != 0);
        *n_bytes = n < 0 ? -n : n;
    });
}

} // extern "C"
