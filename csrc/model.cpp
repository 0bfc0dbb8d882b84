// Devices, models and vocabularies.

#include "internal.hpp"
#include "layers.hpp"

#include "ggml-backend.h"
#include "gguf.h"

#include <algorithm>
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
    sllm::check_header(*file);
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

bool is_control(const llama_vocab * vocab, llama_token token) {
    return token >= 0 && (llama_vocab_get_attr(vocab, token) & LLAMA_TOKEN_ATTR_CONTROL) != 0;
}

// Whether tokenising ends: of RWKV vocabularies llama.cpp looks for the longest token that begins at a byte, and where a token begins with
// that byte and none ends there, it looks at the same place for ever, and adds a token each time.
bool tokenizer_ends(const llama_vocab * vocab, int32_t n_tokens) {
    if (llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_RWKV) {
        return true;
    }
    std::array<bool, 256> alone{};
    for (llama_token token = 0; token < n_tokens; ++token) {
        char piece[8];
        if (llama_token_to_piece(vocab, token, piece, sizeof piece, 0, true) == 1) {
            alone[static_cast<unsigned char>(piece[0])] = true;
        }
    }
    return std::all_of(alone.begin(), alone.end(), [](bool has) { return has; });
}

// llama.cpp has ids for the special tokens that a file does not name: 11 in BPE vocabularies, which is a parenthesis or a comma. Such an id
// counts where a control token stands there, as in most files of the kinds that have had these ids for ever, and never in BPE ones.
std::shared_ptr<sllm::Specials> specials_of(const llama_model * model, const llama_vocab * vocab) {
    auto specials = std::make_shared<sllm::Specials>();
    const int32_t type = llama_vocab_type(vocab);
    if (type == LLAMA_VOCAB_TYPE_NONE) {
        return specials;
    }
    const auto checked = [&](const char * key, llama_token token) {
        char text[32];
        const bool named = llama_model_meta_val_str(model, key, text, sizeof text) >= 0 && token >= 0 && std::to_string(token) == text;
        return named || (type != LLAMA_VOCAB_TYPE_BPE && is_control(vocab, token)) ? token : -1;
    };
    specials->bos = checked("tokenizer.ggml.bos_token_id", llama_vocab_bos(vocab));
    specials->eos = checked("tokenizer.ggml.eos_token_id", llama_vocab_eos(vocab));
    specials->pad = checked("tokenizer.ggml.padding_token_id", llama_vocab_pad(vocab));
    specials->sep = checked("tokenizer.ggml.seperator_token_id", llama_vocab_sep(vocab));
    specials->eot = llama_vocab_eot(vocab); // named, or found by its text
    const llama_token eos = llama_vocab_eos(vocab);
    if (specials->eos < 0 && eos >= 0 && eos != specials->eot && !is_control(vocab, eos)) {
        specials->made_up = eos;
    }
    specials->tokenizes = tokenizer_ends(vocab, llama_vocab_n_tokens(vocab));
    if (!specials->tokenizes) {
        return specials;
    }
    try {
        llama_token first[8];
        char piece[16];
        const bool found = llama_tokenize(vocab, "a", 1, first, 8, false, false) > 0;
        specials->space_prefix = found && llama_token_to_piece(vocab, first[0], piece, sizeof piece, 0, false) > 0 && piece[0] == ' ';
    } catch (const std::exception &) {
        specials->space_prefix = false; // it has no token for this letter; whoever tokenises a text will be told
    }
    return specials;
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
#ifndef SLLM_NO_MTP
    if (is_layers) {
        model->n_mtp = params.load_mtp;
        p.load_mtp = model->n_mtp > 0;
    }
#endif
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
    if (params.vocab_only == 0) {
        sllm::check_graph(*model, false);
    }
    if (params.vocabulary != nullptr) {
        if (params.vocabulary->n_vocab != model->n_vocab) {
            sllm::fail(SLLM_ERR_LOAD, "its output has %d rows, and its vocabulary %d tokens", model->n_vocab, params.vocabulary->n_vocab);
        }
        model->vocabulary = params.vocabulary->model;
        model->vocab = params.vocabulary->vocab;
        model->specials = params.vocabulary->specials;
    } else {
        model->specials = specials_of(model->model.get(), model->vocab);
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

bool sllm_model::file_ends(llama_token token) const { return token != specials->made_up && llama_vocab_is_eog(vocab, token); }

bool sllm_model::ends(llama_token token) const {
    const auto & turns = specials->turn_ends;
    return token >= 0 && (file_ends(token) || std::find(turns.begin(), turns.end(), token) != turns.end());
}

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
    const sllm::Specials & specials = *model->specials;
    info->bos = specials.bos;
    info->eos = specials.eos;
    info->eot = specials.eot;
    info->pad = specials.pad;
    info->made_up = specials.made_up;
    info->add_bos = llama_vocab_get_add_bos(model->vocab) ? 1 : 0;
    info->add_eos = llama_vocab_get_add_eos(model->vocab) ? 1 : 0;
    info->n_mtp = model->n_mtp;
    info->rollback = static_cast<int32_t>(model->rollback);
    info->space_prefix = specials.space_prefix ? 1 : 0;
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
        if (!model->specials->tokenizes) {
            sllm::fail(SLLM_ERR_UNSUPPORTED,
                       "its vocabulary (rwkv) does not have every byte as a token, and llama.cpp would not come to an end");
        }
        // What llama.cpp adds: without an id it would abort, or add the id of its own that the file does not have.
        llama_token before = -1;
        llama_token after = -1;
        const sllm::Specials & specials = *model->specials;
        switch (add_special != 0 ? llama_vocab_type(model->vocab) : LLAMA_VOCAB_TYPE_NONE) {
        case LLAMA_VOCAB_TYPE_SPM:
        case LLAMA_VOCAB_TYPE_BPE:
        case LLAMA_VOCAB_TYPE_UGM:
            before = llama_vocab_get_add_bos(model->vocab) ? specials.bos : -1;
            after = llama_vocab_get_add_eos(model->vocab) ? specials.eos : -1;
            break;
        case LLAMA_VOCAB_TYPE_WPM:
            before = specials.bos;
            after = specials.sep;
            break;
        default: break;
        }
        const int32_t n_before = before >= 0 ? 1 : 0;
        const int32_t n_added = n_before + (after >= 0 ? 1 : 0);
        const int32_t room = std::max(capacity - n_added, 0);
        int32_t n = llama_tokenize(model->vocab, text, size, room > 0 ? tokens + n_before : nullptr, room, false, parse_special != 0);
        if (n == std::numeric_limits<int32_t>::min()) {
            sllm::fail(SLLM_ERR_INVALID, "the text makes more than 2^31 tokens");
        }
        n = n < 0 ? -n : n;
        *n_tokens = n + n_added;
        if (*n_tokens <= capacity) {
            if (n_before > 0) {
                tokens[0] = before;
            }
            if (after >= 0) {
                tokens[n_before + n] = after;
            }
        }
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
    bits |= model->file_ends(token) ? 2 : 0;
    bits |= (attr & LLAMA_TOKEN_ATTR_BYTE) != 0 ? 4 : 0;
    bits |= (attr & LLAMA_TOKEN_ATTR_USER_DEFINED) != 0 ? 8 : 0;
    bits |= (attr & LLAMA_TOKEN_ATTR_UNUSED) != 0 ? 16 : 0;
    bits |= (attr & LLAMA_TOKEN_ATTR_UNKNOWN) != 0 ? 32 : 0;
    return bits;
}

int32_t sllm_tokens_with(const sllm_model * model, int32_t bits, int32_t * tokens, int32_t capacity) {
    int32_t n = 0;
    for (int32_t token = 0; token < model->n_vocab; ++token) {
        const int32_t has = sllm_token_attr(model, token);
        if (has < 0 || (has & bits) == 0) {
            continue;
        }
        if (n < capacity) {
            tokens[n] = token;
        }
        ++n;
    }
    return n;
}

int sllm_model_end_turns(sllm_model * model, const int32_t * tokens, int32_t n_tokens) {
    return sllm::guarded([&] {
        auto & ends = model->specials->turn_ends;
        if (n_tokens < 0 || static_cast<size_t>(n_tokens) > ends.size()) {
            sllm::fail(SLLM_ERR_INVALID, "%d tokens, where %zu are the most", n_tokens, ends.size());
        }
        for (size_t i = 0; i < ends.size(); ++i) {
            ends[i] = i < static_cast<size_t>(n_tokens) ? tokens[i] : -1;
        }
    });
}

// Not llama_detokenize(), which takes spaces out of the text where the pre-tokeniser is one of a few dozen.
int sllm_detokenize(const sllm_model * model, const int32_t * tokens, int32_t n_tokens, int32_t special, int32_t goes_on, char * bytes,
                    int32_t capacity, int32_t * n_bytes) {
    return sllm::guarded([&] {
        check_vocab(*model);
        for (int32_t i = 0; i < n_tokens; ++i) {
            if (tokens[i] < 0 || tokens[i] >= model->n_vocab) {
                sllm::fail(SLLM_ERR_INVALID, "token %d is not in the vocabulary of %d tokens", tokens[i], model->n_vocab);
            }
        }
        bool strip = model->specials->space_prefix && goes_on == 0;
        int32_t n = 0;
        for (int32_t i = 0; i < n_tokens; ++i) {
            const bool as_it_is = (llama_vocab_get_attr(model->vocab, tokens[i]) & LLAMA_TOKEN_ATTR_USER_DEFINED) != 0;
            const int32_t room = std::max(capacity - n, 0);
            const int32_t lstrip = strip && !as_it_is ? 1 : 0;
            const int32_t written =
                llama_token_to_piece(model->vocab, tokens[i], room > 0 ? bytes + n : nullptr, room, lstrip, special != 0);
            const int32_t size = written < 0 ? -written : written;
            if (size > std::numeric_limits<int32_t>::max() - n) {
                sllm::fail(SLLM_ERR_INVALID, "the tokens make more than 2^31 bytes");
            }
            n += size;
            // The space is before the first text; a control token has none.
            strip = strip && size == 0 && lstrip == 1 && is_control(model->vocab, tokens[i]);
        }
        *n_bytes = n;
    });
}

} // extern "C"
