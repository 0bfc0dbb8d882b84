// Some layers of a model: a GGUF that is put together while it is read, and hidden states in and out.

#include "layers.hpp"

#include "internal.hpp"

#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>

#ifndef _WIN32
#include <fcntl.h>
#include <unistd.h>
#endif

namespace {

struct View {
    const sllm_model_params & params;
    std::vector<uint64_t> ends; // of each piece, in the file that llama.cpp sees
    uint64_t at = 0;

    explicit View(const sllm_model_params & p) : params(p) {
        uint64_t end = p.header_size;
        for (int32_t i = 0; i < p.n_pieces; ++i) {
            end += p.pieces[i].size;
            ends.push_back(end);
        }
    }

    uint64_t size() const { return ends.empty() ? params.header_size : ends.back(); }
};

#ifndef _WIN32

// Up to `size` bytes from where the view is; 0 at its end, -1 with errno set.
int64_t read_view(View & view, char * buffer, size_t size) {
    const sllm_model_params & p = view.params;
    if (view.at < p.header_size) {
        const size_t n = std::min<uint64_t>(size, p.header_size - view.at);
        std::memcpy(buffer, p.header + view.at, n);
        view.at += n;
        return static_cast<int64_t>(n);
    }
    const auto found = std::upper_bound(view.ends.begin(), view.ends.end(), view.at);
    if (found == view.ends.end()) {
        return 0;
    }
    const sllm_piece & piece = p.pieces[found - view.ends.begin()];
    const uint64_t left = *found - view.at;
    const size_t n = std::min<uint64_t>(size, left);
    if (piece.file < 0) {
        std::memset(buffer, 0, n);
        view.at += n;
        return static_cast<int64_t>(n);
    }
    ssize_t got = 0;
    do {
        got = pread(p.files[piece.file], buffer, n, static_cast<off_t>(piece.offset + (piece.size - left)));
    } while (got < 0 && errno == EINTR);
    if (got > 0) {
        view.at += static_cast<uint64_t>(got);
    }
    return got;
}

int seek_view(View & view, int64_t * offset, int whence) {
    const int64_t base = whence == SEEK_SET ? 0 : static_cast<int64_t>(whence == SEEK_CUR ? view.at : view.size());
    if (*offset < -base) {
        errno = EINVAL;
        return -1;
    }
    view.at = static_cast<uint64_t>(base + *offset);
    *offset = static_cast<int64_t>(view.at);
    return 0;
}

#ifdef __linux__

FILE * open_view(View & view) {
    cookie_io_functions_t calls{};
    calls.read = [](void * cookie, char * buffer, size_t size) -> ssize_t { return read_view(*static_cast<View *>(cookie), buffer, size); };
    calls.seek = [](void * cookie, off64_t * offset, int whence) -> int {
        int64_t at = *offset;
        const int failed = seek_view(*static_cast<View *>(cookie), &at, whence);
        *offset = at;
        return failed;
    };
    return fopencookie(&view, "rb", calls);
}

#else // the BSDs, and macOS among them

FILE * open_view(View & view) {
    return funopen(
        &view,
        [](void * cookie, char * buffer, int size) { return static_cast<int>(read_view(*static_cast<View *>(cookie), buffer, size)); },
        nullptr,
        [](void * cookie, fpos_t offset, int whence) -> fpos_t {
            int64_t at = offset;
            return seek_view(*static_cast<View *>(cookie), &at, whence) != 0 ? -1 : at;
        },
        nullptr);
}

#endif
#endif

} // namespace

namespace sllm {

llama_model * load_layers(const sllm_model_params & params, const llama_model_params & p) {
#ifdef _WIN32
    (void)params;
    (void)p;
    fail(SLLM_ERR_UNSUPPORTED, "layers of a model cannot be loaded on Windows yet");
#else
    for (int32_t i = 0; i < params.n_pieces; ++i) {
        if (params.pieces[i].file >= params.n_files) {
            fail(SLLM_ERR_INVALID, "piece %d is of file %d, and there are %d", i, params.pieces[i].file, params.n_files);
        }
    }
    const std::unique_ptr<gguf_context, void (*)(gguf_context *)> header(
        gguf_init_from_buffer(params.header, params.header_size, {true, nullptr}), &gguf_free);
    if (header != nullptr) { // else llama.cpp says what is wrong
        check_header(*header);
    }
    View view(params);
    const std::unique_ptr<FILE, int (*)(FILE *)> file(open_view(view), &fclose);
    if (file == nullptr) {
        fail(SLLM_ERR_NO_MEMORY, "cannot open the layers as a file: %s", std::strerror(errno));
    }
    return llama_model_load_from_file_ptr(file.get(), p);
#endif
}

// As sllm_dequantize() says it.
void dequantize(int32_t type, const uint8_t * data, uint64_t size, int32_t n_rows, int32_t n_columns, float * out) {
    const uint64_t row = sllm_row_size(type, n_columns);
    if (row == 0) {
        fail(SLLM_ERR_UNSUPPORTED, "ggml's type %d has no rows of %d weights", type, n_columns);
    }
    if (n_rows < 0 || size != row * static_cast<uint64_t>(n_rows)) {
        fail(SLLM_ERR_INVALID, "%d rows of %llu bytes are not %llu bytes", n_rows, static_cast<unsigned long long>(row),
             static_cast<unsigned long long>(size));
    }
    if (type == GGML_TYPE_F32) {
        std::memcpy(out, data, size);
        return;
    }
    const ggml_to_float_t to_float = ggml_get_type_traits(static_cast<ggml_type>(type))->to_float;
    if (to_float == nullptr) {
        fail(SLLM_ERR_UNSUPPORTED, "weights of the type %s cannot be read row by row", ggml_type_name(static_cast<ggml_type>(type)));
    }
    for (int32_t i = 0; i < n_rows; ++i) {
        to_float(data + static_cast<uint64_t>(i) * row, out + static_cast<size_t>(i) * static_cast<size_t>(n_columns), n_columns);
    }
}

#ifdef _WIN32

EmbeddingRows::EmbeddingRows(const sllm_embedding & where, size_t) : at(where), width(0), row_size(0) {
    fail(SLLM_ERR_UNSUPPORTED, "layers of a model cannot be loaded on Windows yet");
}

EmbeddingRows::~EmbeddingRows() = default;

void EmbeddingRows::read(llama_token, float *) const {}

#else

EmbeddingRows::EmbeddingRows(const sllm_embedding & where, size_t n_columns)
    : at(where), width(static_cast<int32_t>(n_columns)), row_size(sllm_row_size(where.type, width)) {
    if (row_size == 0) {
        fail(SLLM_ERR_UNSUPPORTED, "an embedding of ggml's type %d has no rows of %d weights", at.type, width);
    }
    at.file = fcntl(where.file, F_DUPFD_CLOEXEC, 0);
    if (at.file < 0) {
        fail(SLLM_ERR_INVALID, "the file of the embedding cannot be kept open: %s", std::strerror(errno));
    }
}

EmbeddingRows::~EmbeddingRows() { close(at.file); }

void EmbeddingRows::read(llama_token token, float * out) const {
    std::vector<uint8_t> data(row_size);
    size_t n_read = 0;
    while (n_read < data.size()) {
        const uint64_t offset = at.offset + static_cast<uint64_t>(token) * row_size + n_read;
        const ssize_t got = pread(at.file, data.data() + n_read, data.size() - n_read, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            fail(SLLM_ERR_COMPUTE, "row %d of the embedding cannot be read: %s", token,
                 got < 0 ? std::strerror(errno) : "its file ends before");
        }
        n_read += static_cast<size_t>(got);
    }
    dequantize(at.type, data.data(), row_size, 1, width, out);
}

#endif

} // namespace sllm

namespace {

// The tree of hidden states with these parents.
std::vector<sllm::Node> tree_of_rows(const sllm_context & context, const int32_t * parents, size_t n, std::vector<int32_t> & order) {
    if (!sllm::can_branch(context)) {
        sllm::fail(SLLM_ERR_UNSUPPORTED, "the memory of these layers holds no trees");
    }
    if (n > sllm::N_TREE_NODES || n >= context.info.n_batch) {
        sllm::fail(SLLM_ERR_INVALID, "a tree has %zu nodes, expected at most %zu, and fewer than n_batch (%u)", n, sllm::N_TREE_NODES,
                   context.info.n_batch);
    }
    std::vector<int32_t> names(n); // which tokens these are is not known here
    std::iota(names.begin(), names.end(), 0);
    return sllm::read_tree(names.data(), parents, n, order);
}

} // namespace

extern "C" {

int sllm_forward(sllm_context * context, int32_t n_seqs, const int32_t * seq_ids, const int32_t * lengths, const int32_t * pos,
                 const int32_t * n_nodes, const int32_t * parents, const float * hidden, float * out) {
    return sllm::guarded([&] {
        const sllm::Entry entry(*context);
        if (!context->model.is_layers) {
            sllm::fail(SLLM_ERR_UNSUPPORTED, "this is a whole model, which takes tokens");
        }
        if (context->model.has_output) {
            sllm::fail(SLLM_ERR_UNSUPPORTED, "these layers end in the model's output: they give logits");
        }
        sllm::check_sequences(*context, n_seqs, seq_ids);
        const size_t width = sllm::n_embd(*context);
        size_t total = 0;
        std::vector<std::vector<sllm::Node>> trees(static_cast<size_t>(n_seqs));
        std::vector<std::vector<int32_t>> orders(trees.size());
        for (int32_t i = 0; i < n_seqs; ++i) {
            const auto seq = static_cast<size_t>(i);
            const int32_t n_tree = n_nodes == nullptr ? 0 : n_nodes[i];
            if (lengths[i] < 1 || n_tree < 0 || n_tree >= lengths[i]) {
                sllm::fail(SLLM_ERR_INVALID, "sequence %d is given %d rows, of which %d are a tree's", seq_ids[i], lengths[i], n_tree);
            }
            if (n_tree > 0) {
                trees[seq] = tree_of_rows(*context, parents, static_cast<size_t>(n_tree), orders[seq]);
                parents += n_tree;
            }
            size_t n = static_cast<size_t>(lengths[i] - n_tree);
            for (const sllm::Node & node : trees[seq]) {
                n = std::max(n, static_cast<size_t>(lengths[i] - n_tree + node.depth + 1));
            }
            sllm::checked_position(*context, seq_ids[i], pos == nullptr ? -1 : pos[i], n);
            total += static_cast<size_t>(lengths[i]);
        }
        sllm::check_hidden(*context, hidden, total);
        std::vector<sllm::Write> writes;
        std::vector<std::vector<float>> sorted(trees.size()); // the rows of trees, in the order of their nodes
        const float * input = hidden;
        for (int32_t i = 0; i < n_seqs; ++i) {
            const auto seq = static_cast<size_t>(i);
            const size_t n = static_cast<size_t>(lengths[i]) - trees[seq].size();
            const size_t at = sllm::checked_position(*context, seq_ids[i], pos == nullptr ? -1 : pos[i], n);
            const std::vector<int32_t> unknown(n, -1); // which tokens these are is not known here
            const size_t begin = sllm::place_tokens(*context, seq_ids[i], at, unknown.data(), n, n);
            writes.push_back({seq_ids[i], begin, at + n, begin, input});
            input += n * width;
            if (!trees[seq].empty()) {
                for (const int32_t row : orders[seq]) {
                    const float * const from = input + static_cast<size_t>(row) * width;
                    sorted[seq].insert(sorted[seq].end(), from, from + width);
                }
                writes.back().tree = &trees[seq];
                writes.back().tree_hidden = sorted[seq].data();
                input += trees[seq].size() * width;
            }
        }
        sllm::forward(*context, writes, out);
        for (size_t i = 0; i < writes.size(); ++i) {
            sllm::Sequence & s = sllm::sequence_at(*context, writes[i].seq_id);
            out += (writes[i].end - writes[i].begin) * width;
            if (!trees[i].empty()) { // what the others were is known when the next rows come; only the main path can stay
                s.tokens.resize(writes[i].end + sllm::main_path(trees[i]), -1);
                sllm::keep_path(*context, writes[i].seq_id, static_cast<int32_t>(sllm::main_path(trees[i])) - 1);
                sorted[i].assign(out, out + trees[i].size() * width);
                for (size_t node = 0; node < orders[i].size(); ++node) {
                    std::copy_n(sorted[i].data() + node * width, width, out + static_cast<size_t>(orders[i][node]) * width);
                }
                out += trees[i].size() * width;
            }
            s.n_committed = s.n_cached;
        }
    });
}

uint64_t sllm_row_size(int32_t type, int32_t n_columns) {
    if (type < 0 || type >= GGML_TYPE_COUNT || n_columns < 1) {
        return 0;
    }
    const auto t = static_cast<ggml_type>(type);
    const int64_t block = ggml_get_type_traits(t)->blck_size;
    return block < 1 || n_columns % block != 0 ? 0 : ggml_row_size(t, n_columns);
}

int sllm_dequantize(int32_t type, const uint8_t * data, uint64_t size, int32_t n_rows, int32_t n_columns, float * out) {
    return sllm::guarded([&] { sllm::dequantize(type, data, size, n_rows, n_columns, out); });
}

} // extern "C"
