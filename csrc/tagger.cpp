// A tagger of characters: embedding, bidirectional GRU layers, a linear layer, and Viterbi's path through a linear-chain CRF (Lafferty,
// McCallum and Pereira 2001; Huang, Xu and Yu 2015, arXiv:1508.01991, with the GRU of Cho et al. 2014, arXiv:1406.1078).
//
// ggml computes graphs, and has a node and a barrier for each step of a recurrence; a step here is a few microseconds in all. So ggml reads
// the file and its quantised rows, and the loops are here, compiled once for each instruction set. They multiply and add in the same order in
// every variant, so all of them give the same tags.

#include "internal.hpp"
#include "variants.hpp"

#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace {

using std::size_t;

// ---- the loops, compiled for several instruction sets

constexpr size_t lane = 16; // the width of every row here is a multiple of it

// Weights lie in blocks of so many columns, each block a row for each input: the products of one row, which wait for nothing but weights,
// read them in one stream. The last block has the columns that are left.
constexpr size_t block = 64;

// Which rows of weights a product reads, and where its sums go.
struct Product {
    const float * in; // rows of `depth` numbers, `in_stride` apart
    size_t in_stride;
    size_t depth;
    const float * weights; // blocks of `depth` rows
    size_t width;
    float * out; // rows of `width` numbers, `out_stride` apart, that are added to
    size_t out_stride;
};

// A tile of R rows and C columns: its sums stay in registers while the inputs pass. The weights of one input are `stride` from the next.
template <size_t R, size_t C> SLLM_BODY void tile(const Product & p, size_t row, size_t column, const float * weights, size_t stride) {
    float sums[R][C];
    for (size_t r = 0; r < R; ++r) {
        for (size_t c = 0; c < C; ++c) {
            sums[r][c] = p.out[(row + r) * p.out_stride + column + c];
        }
    }
    const float * const in = p.in + row * p.in_stride;
    for (size_t k = 0; k < p.depth; ++k, weights += stride) {
        for (size_t r = 0; r < R; ++r) {
            const float x = in[r * p.in_stride + k];
            for (size_t c = 0; c < C; ++c) {
                sums[r][c] += x * weights[c];
            }
        }
    }
    for (size_t r = 0; r < R; ++r) {
        for (size_t c = 0; c < C; ++c) {
            p.out[(row + r) * p.out_stride + column + c] = sums[r][c];
        }
    }
}

template <size_t R, size_t C> SLLM_BODY void strip(const Product & p, size_t row) {
    static_assert(block % C == 0);
    for (size_t begin = 0; begin < p.width; begin += block) {
        const float * const weights = p.weights + begin * p.depth;
        if (p.width - begin >= block) {
            for (size_t c = 0; c < block; c += C) {
                tile<R, C>(p, row, begin + c, weights + c, block);
            }
        } else {
            for (size_t c = 0; begin + c < p.width; c += lane) {
                tile<R, lane>(p, row, begin + c, weights + c, p.width - begin);
            }
        }
    }
}

// `wide` columns for a single row, `narrow` for `rows`: as many as registers hold.
template <size_t wide, size_t rows, size_t narrow> SLLM_BODY void multiply_body(const Product & p, size_t n_rows) {
    size_t row = 0;
    for (; row + rows <= n_rows; row += rows) {
        strip<rows, narrow>(p, row);
    }
    for (; row < n_rows; ++row) {
        strip<1, wide>(p, row);
    }
}

SLLM_BODY float sigmoid(float x) {
    const float e = sllm::exp_negative(x > 0 ? -x : x);
    const float s = 1.0F / (1.0F + e);
    return x > 0 ? s : e * s;
}

SLLM_BODY float tanh_of(float x) { return 2.0F * sigmoid(2.0F * x) - 1.0F; }

// The gates of one step, update and reset; `reset_state` becomes reset * state.
SLLM_BODY void gates_body(float * gates, const float * state, float * reset_state, size_t width) {
    for (size_t i = 0; i < 2 * width; ++i) {
        gates[i] = sigmoid(gates[i]);
    }
    for (size_t i = 0; i < width; ++i) {
        reset_state[i] = gates[width + i] * state[i];
    }
}

SLLM_BODY void state_body(const float * gates, const float * candidate, float * state, size_t width) {
    for (size_t i = 0; i < width; ++i) {
        state[i] = (1.0F - gates[i]) * state[i] + gates[i] * tanh_of(candidate[i]);
    }
}

// One step of Viterbi: `scores` of paths that end in each label become those one character on, without what that character says, and `from`
// where each comes from: of equal ones the first.
SLLM_BODY void paths_body(const float * scores, size_t n_labels, const float * transitions, size_t width, float * next, int32_t * from) {
    for (size_t begin = 0; begin < width; begin += lane) {
        float best[lane];
        int32_t where[lane];
        for (size_t j = 0; j < lane; ++j) {
            best[j] = -std::numeric_limits<float>::infinity();
            where[j] = 0;
        }
        for (size_t i = 0; i < n_labels; ++i) {
            const float score = scores[i];
            const float * const row = transitions + i * width + begin;
            for (size_t j = 0; j < lane; ++j) {
                const float candidate = score + row[j];
                where[j] = candidate > best[j] ? static_cast<int32_t>(i) : where[j];
                best[j] = candidate > best[j] ? candidate : best[j];
            }
        }
        for (size_t j = 0; j < lane; ++j) {
            next[begin + j] = best[j];
            from[begin + j] = where[j];
        }
    }
}

struct Code {
    void (*multiply)(const Product & product, size_t n_rows);
    void (*gates)(float * gates, const float * state, float * reset_state, size_t width);
    void (*state)(const float * gates, const float * candidate, float * state, size_t width);
    void (*paths)(const float * scores, size_t n_labels, const float * transitions, size_t width, float * next, int32_t * from);
};

#define SLLM_TAGGER_CODE(name, target, wide, rows, narrow)                                                                                 \
    namespace name {                                                                                                                       \
    target void multiply(const Product & product, size_t n_rows) { multiply_body<wide, rows, narrow>(product, n_rows); }                   \
    target void gates(float * g, const float * state, float * reset_state, size_t width) { gates_body(g, state, reset_state, width); }     \
    target void state(const float * g, const float * candidate, float * s, size_t width) { state_body(g, candidate, s, width); }           \
    target void paths(const float * scores, size_t n_labels, const float * transitions, size_t width, float * next, int32_t * from) {      \
        paths_body(scores, n_labels, transitions, width, next, from);                                                                      \
    }                                                                                                                                      \
    constexpr Code code = {multiply, gates, state, paths};                                                                                 \
    }

SLLM_TAGGER_CODE(baseline, , 32, 1, 32)
#if SLLM_X86_VARIANTS
SLLM_TAGGER_CODE(avx2, SLLM_TARGET_AVX2, 64, 2, 32)
SLLM_TAGGER_CODE(avx512, SLLM_TARGET_AVX512, 64, 4, 64)
#endif

const Code & code() {
    static constexpr const Code * codes[sllm::most_variants] = {
        &baseline::code,
#if SLLM_X86_VARIANTS
        &avx2::code,
        &avx512::code,
#endif
    };
    return *codes[sllm::variant()];
}

// ---- the weights

constexpr size_t most_units = 4096; // width of an embedding, of a state
constexpr size_t most_layers = 8;
constexpr size_t most_labels = 1024;
constexpr size_t most_rows = size_t{1} << 22; // of the embedding
constexpr uint32_t end_of_unicode = 0x110000;

constexpr size_t padded(size_t n) { return (n + lane - 1) / lane * lane; }

// One direction of a layer. A state has `padded(n_units)` numbers, of which the last are 0 and stay so.
struct Direction {
    std::vector<float> in;        // from the input to update, reset and candidate
    std::vector<float> bias;      // of these
    std::vector<float> gates;     // from the state to update and reset
    std::vector<float> candidate; // from the state, after it was reset, to the candidate
};

struct Layer {
    size_t depth; // of the input
    std::array<Direction, 2> directions;
};

} // namespace

struct sllm_tagger {
    size_t n_units = 0; // padded
    size_t n_embd = 0;  // padded
    std::vector<float> embd;
    std::vector<int32_t> rows; // of each character up to the last that the file knows
    int32_t unknown = 0;
    std::vector<Layer> layers;
    std::vector<float> out; // from both states to the labels
    std::vector<float> out_bias;
    std::vector<float> start;
    std::vector<float> end;
    std::vector<float> transitions;
    std::vector<std::string> labels;
};

namespace {

// ---- reading a file, of which nothing is believed

struct FreeGGUF {
    void operator()(gguf_context * p) const { gguf_free(p); }
};

struct CloseFile {
    void operator()(FILE * p) const { std::fclose(p); }
};

class File {
  public:
    explicit File(const char * path) : stream(std::fopen(path, "rb")) {
        if (stream == nullptr) {
            sllm::fail(SLLM_ERR_LOAD, "%s", std::strerror(errno));
        }
        try {
            gguf.reset(gguf_init_from_file_ptr(stream.get(), {true, nullptr}));
        } catch (const sllm::Error & error) {
            throw sllm::Error(SLLM_ERR_LOAD, error.text);
        }
        if (gguf == nullptr) {
            const std::string lines = sllm::Guard::logged_errors();
            throw sllm::Error(SLLM_ERR_LOAD, lines.empty() ? "it is no GGUF file" : lines);
        }
        if (std::fseek(stream.get(), 0, SEEK_END) != 0) {
            sllm::fail(SLLM_ERR_LOAD, "%s", std::strerror(errno));
        }
        size = static_cast<uint64_t>(std::max(0L, std::ftell(stream.get())));
    }

    int64_t key(const char * name, gguf_type type) const {
        const int64_t found = gguf_find_key(gguf.get(), name);
        if (found < 0 || gguf_get_kv_type(gguf.get(), found) != type) {
            sllm::fail(SLLM_ERR_LOAD, "it has no %s of type %s", name, gguf_type_name(type));
        }
        return found;
    }

    uint32_t number(const char * name) const { return gguf_get_val_u32(gguf.get(), key(name, GGUF_TYPE_UINT32)); }
    std::string text(const char * name) const { return gguf_get_val_str(gguf.get(), key(name, GGUF_TYPE_STRING)); }

    std::vector<std::string> texts(const char * name, size_t at_most) const {
        const int64_t found = key(name, GGUF_TYPE_ARRAY);
        const size_t n = gguf_get_arr_type(gguf.get(), found) == GGUF_TYPE_STRING ? gguf_get_arr_n(gguf.get(), found) : 0;
        if (n < 1 || n > at_most) {
            sllm::fail(SLLM_ERR_LOAD, "%s has %zu texts, expected 1 to %zu", name, n, at_most);
        }
        std::vector<std::string> all;
        for (size_t i = 0; i < n; ++i) {
            all.emplace_back(gguf_get_arr_str(gguf.get(), found, i));
        }
        return all;
    }

    bool has(const std::string & name) const { return gguf_find_tensor(gguf.get(), name.c_str()) >= 0; }

    // The width of a tensor's rows, and how many there are.
    std::array<size_t, 2> shape(const std::string & name) const {
        const int64_t * ne = gguf_get_tensor_ne(gguf.get(), index(name));
        if (ne[0] < 1 || ne[1] < 1 || ne[2] != 1 || ne[3] != 1) {
            sllm::fail(SLLM_ERR_LOAD, "the tensor %s has %" PRId64 " x %" PRId64 " x %" PRId64 " x %" PRId64 " numbers, expected a matrix",
                       name.c_str(), ne[0], ne[1], ne[2], ne[3]);
        }
        return {static_cast<size_t>(ne[0]), static_cast<size_t>(ne[1])};
    }

    // A tensor of these dimensions, as float32; every number is finite.
    std::vector<float> floats(const std::string & name, size_t width, size_t n_rows) const {
        const ggml_type type = gguf_get_tensor_type(gguf.get(), index(name));
        if (type != GGML_TYPE_F32 && type != GGML_TYPE_Q8_0) {
            sllm::fail(SLLM_ERR_LOAD, "the tensor %s is of type %s, expected f32 or q8_0", name.c_str(), ggml_type_name(type));
        }
        const std::vector<uint8_t> raw = bytes(name, width, n_rows, ggml_row_size(type, static_cast<int64_t>(width)));
        std::vector<float> numbers(width * n_rows);
        if (type == GGML_TYPE_F32) {
            std::memcpy(numbers.data(), raw.data(), raw.size());
        } else {
            ggml_get_type_traits(type)->to_float(raw.data(), numbers.data(), static_cast<int64_t>(numbers.size()));
        }
        if (!std::all_of(numbers.begin(), numbers.end(), [](float x) { return std::fabs(x) < 1e6F; })) { // NaN is not either
            sllm::fail(SLLM_ERR_LOAD, "the tensor %s holds numbers beyond a million, or none", name.c_str());
        }
        return numbers;
    }

    std::vector<int32_t> integers(const std::string & name, size_t n) const {
        const ggml_type type = gguf_get_tensor_type(gguf.get(), index(name));
        if (type != GGML_TYPE_I32) {
            sllm::fail(SLLM_ERR_LOAD, "the tensor %s is of type %s, expected i32", name.c_str(), ggml_type_name(type));
        }
        const std::vector<uint8_t> raw = bytes(name, n, 1, n * sizeof(int32_t));
        std::vector<int32_t> numbers(n);
        std::memcpy(numbers.data(), raw.data(), raw.size());
        return numbers;
    }

  private:
    int64_t index(const std::string & name) const {
        const int64_t found = gguf_find_tensor(gguf.get(), name.c_str());
        if (found < 0) {
            sllm::fail(SLLM_ERR_LOAD, "it has no tensor %s", name.c_str());
        }
        return found;
    }

    std::vector<uint8_t> bytes(const std::string & name, size_t width, size_t n_rows, size_t row_size) const {
        const int64_t at = index(name);
        const std::array<size_t, 2> found = shape(name);
        if (found[0] != width || found[1] != n_rows) {
            sllm::fail(SLLM_ERR_LOAD, "the tensor %s has %zu x %zu numbers, expected %zu x %zu", name.c_str(), found[0], found[1], width,
                       n_rows);
        }
        const uint64_t base = gguf_get_data_offset(gguf.get());
        const uint64_t offset = gguf_get_tensor_offset(gguf.get(), at);
        const uint64_t n_bytes = static_cast<uint64_t>(row_size) * n_rows;
        if (base > size || offset > size - base || n_bytes > size - base - offset) {
            sllm::fail(SLLM_ERR_LOAD, "the tensor %s ends beyond the file's %" PRIu64 " bytes; the file is cut short", name.c_str(), size);
        }
        std::vector<uint8_t> raw(static_cast<size_t>(n_bytes));
        if (std::fseek(stream.get(), static_cast<long>(base + offset), SEEK_SET) != 0 ||
            std::fread(raw.data(), 1, raw.size(), stream.get()) != raw.size()) {
            sllm::fail(SLLM_ERR_LOAD, "the tensor %s cannot be read", name.c_str());
        }
        return raw;
    }

    std::unique_ptr<FILE, CloseFile> stream;
    std::unique_ptr<gguf_context, FreeGGUF> gguf;
    uint64_t size = 0;
};

// Where the numbers of a padded row come from: `n_blocks` blocks of `n` numbers each, which lie `step` apart.
struct Blocks {
    size_t n_blocks;
    size_t n;

    size_t size() const { return n_blocks * n; }
    size_t width() const { return n_blocks * padded(n); }
    size_t place(size_t i) const { return i / n * padded(n) + i % n; }
};

// The matrix of a file, a row for each output, as products read it: in blocks with a row for each input, and room for vectors.
std::vector<float> turned(const std::vector<float> & matrix, size_t first, const Blocks & in, const Blocks & out) {
    std::vector<float> weights(in.width() * out.width());
    for (size_t o = 0; o < out.size(); ++o) {
        const size_t column = out.place(o) % block;
        const size_t begin = out.place(o) - column;
        const size_t stride = std::min(block, out.width() - begin);
        for (size_t i = 0; i < in.size(); ++i) {
            weights[begin * in.width() + in.place(i) * stride + column] = matrix[(first + o) * in.size() + i];
        }
    }
    return weights;
}

std::vector<float> spread(const std::vector<float> & numbers, const Blocks & blocks, float rest = 0) {
    std::vector<float> row(blocks.width(), rest);
    for (size_t i = 0; i < blocks.size(); ++i) {
        row[blocks.place(i)] = numbers[i];
    }
    return row;
}

void read_vocabulary(const File & file, sllm_tagger & tagger, size_t n_rows) {
    const size_t n_chars = file.shape("chars")[0];
    if (n_chars > end_of_unicode) {
        sllm::fail(SLLM_ERR_LOAD, "it has %zu characters, more than there are", n_chars);
    }
    const std::vector<int32_t> chars = file.integers("chars", n_chars);
    const std::vector<int32_t> rows = file.integers("rows", n_chars);
    const uint32_t unknown = file.number("sllm-tagger.unknown");
    const auto is_row = [n_rows](int64_t row) { return row >= 0 && static_cast<size_t>(row) < n_rows; };
    if (!is_row(unknown) || !std::all_of(rows.begin(), rows.end(), is_row)) {
        sllm::fail(SLLM_ERR_LOAD, "a character's row is not one of the embedding's %zu", n_rows);
    }
    if (chars.front() < 0 || static_cast<uint32_t>(chars.back()) >= end_of_unicode ||
        std::adjacent_find(chars.begin(), chars.end(), [](int32_t a, int32_t b) { return a >= b; }) != chars.end()) {
        sllm::fail(SLLM_ERR_LOAD, "its characters are not code points in rising order");
    }
    tagger.unknown = static_cast<int32_t>(unknown);
    tagger.rows.assign(static_cast<size_t>(chars.back()) + 1, tagger.unknown);
    for (size_t i = 0; i < n_chars; ++i) {
        tagger.rows[static_cast<size_t>(chars[i])] = rows[i];
    }
}

Layer read_layer(const File & file, size_t number, const Blocks & in, size_t n_units) {
    Layer layer{in.width(), {}};
    for (size_t d = 0; d < 2; ++d) {
        const std::string name = "gru." + std::to_string(number) + (d == 0 ? ".forward." : ".backward.");
        const Blocks one{1, n_units};
        const std::vector<float> recurrent = file.floats(name + "recurrent", n_units, 3 * n_units);
        Direction & direction = layer.directions[d];
        direction.in = turned(file.floats(name + "in", in.size(), 3 * n_units), 0, in, {3, n_units});
        direction.bias = spread(file.floats(name + "bias", 3 * n_units, 1), {3, n_units});
        direction.gates = turned(recurrent, 0, one, {2, n_units});
        direction.candidate = turned(recurrent, 2 * n_units, one, one);
    }
    return layer;
}

std::unique_ptr<sllm_tagger> read_tagger(const char * path) {
    const File file(path);
    if (file.text("general.architecture") != "sllm-tagger") {
        sllm::fail(SLLM_ERR_LOAD, "it is a %.60s, not an sllm-tagger", file.text("general.architecture").c_str());
    }
    const uint32_t version = file.number("sllm-tagger.version");
    if (version != 1) {
        sllm::fail(SLLM_ERR_UNSUPPORTED, "it has version %" PRIu32 " of the layout, expected 1", version);
    }
    auto tagger = std::make_unique<sllm_tagger>();
    tagger->labels = file.texts("sllm-tagger.labels", most_labels);

    const auto [n_embd, n_rows] = file.shape("embd");
    const size_t n_units = file.shape("gru.0.forward.recurrent")[0];
    if (n_embd > most_units || n_units > most_units || n_rows > most_rows) {
        sllm::fail(SLLM_ERR_LOAD, "an embedding of %zu x %zu and states of %zu are beyond what taggers have", n_embd, n_rows, n_units);
    }
    const std::vector<float> embd = file.floats("embd", n_embd, n_rows);
    tagger->n_units = padded(n_units);
    tagger->n_embd = padded(n_embd);
    tagger->embd.resize(tagger->n_embd * n_rows);
    for (size_t row = 0; row < n_rows; ++row) {
        std::copy_n(embd.begin() + static_cast<std::ptrdiff_t>(row * n_embd), n_embd,
                    tagger->embd.begin() + static_cast<std::ptrdiff_t>(row * tagger->n_embd));
    }
    read_vocabulary(file, *tagger, n_rows);

    Blocks in{1, n_embd};
    for (size_t i = 0; i < most_layers && file.has("gru." + std::to_string(i) + ".forward.in"); ++i) {
        tagger->layers.push_back(read_layer(file, i, in, n_units));
        in = {2, n_units};
    }
    if (tagger->layers.empty()) {
        sllm::fail(SLLM_ERR_LOAD, "it has no tensor gru.0.forward.in");
    }
    const size_t n_labels = tagger->labels.size();
    const Blocks labels{1, n_labels};
    constexpr float never = -std::numeric_limits<float>::infinity();
    tagger->out = turned(file.floats("out", 2 * n_units, n_labels), 0, in, labels);
    tagger->out_bias = spread(file.floats("out_bias", n_labels, 1), labels);
    tagger->start = spread(file.floats("start", n_labels, 1), labels, never);
    tagger->end = spread(file.floats("end", n_labels, 1), labels, never);
    const std::vector<float> transitions = file.floats("transitions", n_labels, n_labels);
    for (size_t from = 0; from < n_labels; ++from) {
        const auto row = transitions.begin() + static_cast<std::ptrdiff_t>(from * n_labels);
        const std::vector<float> one(row, row + static_cast<std::ptrdiff_t>(n_labels));
        const std::vector<float> wide = spread(one, labels, never);
        tagger->transitions.insert(tagger->transitions.end(), wide.begin(), wide.end());
    }
    return tagger;
}

// ---- tagging

constexpr size_t most_lanes = 8;        // sequences that go through a recurrence together: the weights are read once for all of them
constexpr size_t most_together = 4096;  // characters of these, unless one alone has more
constexpr size_t most_chars = 1U << 16; // of one sequence

// Sequences of one pass, the longest first, and their rows, sequence by sequence.
struct Group {
    std::vector<size_t> sequences;
    std::vector<size_t> first; // row of each
    std::vector<size_t> lengths;
    size_t n_rows = 0;
};

// The longest first, so that those of a group have about the same length.
std::vector<Group> grouped(const int32_t * lengths, size_t n_seqs) {
    std::vector<size_t> order(n_seqs);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [lengths](size_t a, size_t b) { return lengths[a] > lengths[b]; });
    std::vector<Group> groups;
    for (const size_t i : order) {
        const auto length = static_cast<size_t>(lengths[i]);
        if (length == 0) {
            break;
        }
        if (groups.empty() || groups.back().sequences.size() == most_lanes || groups.back().n_rows + length > most_together) {
            groups.emplace_back();
        }
        Group & group = groups.back();
        group.sequences.push_back(i);
        group.first.push_back(group.n_rows);
        group.lengths.push_back(length);
        group.n_rows += length;
    }
    return groups;
}

void check_running() {
    if (sllm::shutting_down() || sllm::interrupted()) {
        sllm::fail(SLLM_ERR_INTERRUPTED, "interrupted");
    }
}

// What one call computes in, kept from group to group.
class Pass {
  public:
    explicit Pass(const sllm_tagger & with) : tagger(with), kernels(code()) {}

    void run(const Group & group, const uint32_t * const * chars, int32_t * const * labels) {
        look_up(group, chars);
        for (const Layer & layer : tagger.layers) {
            next.resize(group.n_rows * 2 * tagger.n_units);
            for (size_t d = 0; d < 2; ++d) {
                check_running();
                scan(group, layer, d);
            }
            hidden.swap(next);
        }
        decode(group, labels);
    }

  private:
    void look_up(const Group & group, const uint32_t * const * chars) {
        hidden.resize(group.n_rows * tagger.n_embd);
        float * out = hidden.data();
        for (size_t s = 0; s < group.sequences.size(); ++s) {
            const uint32_t * const text = chars[group.sequences[s]];
            for (size_t i = 0; i < group.lengths[s]; ++i, out += tagger.n_embd) {
                const uint32_t c = text[i];
                const int32_t row = c < tagger.rows.size() ? tagger.rows[c] : tagger.unknown;
                std::memcpy(out, &tagger.embd[static_cast<size_t>(row) * tagger.n_embd], tagger.n_embd * sizeof(float));
            }
        }
    }

    // One direction of a layer over a group: from `hidden` into its half of the rows of `next`.
    void scan(const Group & group, const Layer & layer, size_t d) {
        const Direction & direction = layer.directions[d];
        const size_t width = tagger.n_units;
        sums.resize(group.n_rows * 3 * width);
        for (size_t row = 0; row < group.n_rows; ++row) {
            std::copy(direction.bias.begin(), direction.bias.end(), sums.begin() + static_cast<std::ptrdiff_t>(row * 3 * width));
        }
        kernels.multiply({hidden.data(), layer.depth, layer.depth, direction.in.data(), 3 * width, sums.data(), 3 * width}, group.n_rows);

        states.assign(most_lanes * width, 0.0F);
        resets.resize(most_lanes * width);
        steps.resize(most_lanes * 3 * width);
        float * const candidates = steps.data() + most_lanes * 2 * width;
        size_t n = group.sequences.size(); // that have a step left
        for (size_t step = 0; step < group.lengths.front(); ++step) {
            while (group.lengths[n - 1] <= step) {
                --n;
            }
            const auto row_of = [&](size_t i) { return group.first[i] + (d == 0 ? step : group.lengths[i] - 1 - step); };
            for (size_t i = 0; i < n; ++i) {
                const float * const sum = &sums[row_of(i) * 3 * width];
                std::memcpy(&steps[i * 2 * width], sum, 2 * width * sizeof(float));
                std::memcpy(candidates + i * width, sum + 2 * width, width * sizeof(float));
            }
            kernels.multiply({states.data(), width, width, direction.gates.data(), 2 * width, steps.data(), 2 * width}, n);
            for (size_t i = 0; i < n; ++i) {
                kernels.gates(&steps[i * 2 * width], &states[i * width], &resets[i * width], width);
            }
            kernels.multiply({resets.data(), width, width, direction.candidate.data(), width, candidates, width}, n);
            for (size_t i = 0; i < n; ++i) {
                kernels.state(&steps[i * 2 * width], candidates + i * width, &states[i * width], width);
                std::memcpy(&next[row_of(i) * 2 * width + d * width], &states[i * width], width * sizeof(float));
            }
        }
    }

    void decode(const Group & group, int32_t * const * labels) {
        const size_t n_labels = tagger.labels.size();
        const size_t width = padded(n_labels);
        sums.resize(group.n_rows * width);
        for (size_t row = 0; row < group.n_rows; ++row) {
            std::copy(tagger.out_bias.begin(), tagger.out_bias.end(), sums.begin() + static_cast<std::ptrdiff_t>(row * width));
        }
        const size_t depth = 2 * tagger.n_units;
        kernels.multiply({hidden.data(), depth, depth, tagger.out.data(), width, sums.data(), width}, group.n_rows);
        std::vector<float> scores(width);
        std::vector<float> onward(width);
        for (size_t i = 0; i < group.sequences.size(); ++i) {
            check_running();
            const size_t length = group.lengths[i];
            from.resize(length * width);
            const float * said = &sums[group.first[i] * width];
            for (size_t j = 0; j < width; ++j) {
                scores[j] = tagger.start[j] + said[j];
            }
            for (size_t t = 1; t < length; ++t) {
                said += width;
                kernels.paths(scores.data(), n_labels, tagger.transitions.data(), width, onward.data(), &from[t * width]);
                for (size_t j = 0; j < width; ++j) {
                    scores[j] = onward[j] + said[j];
                }
            }
            for (size_t j = 0; j < width; ++j) {
                scores[j] += tagger.end[j];
            }
            auto label = static_cast<int32_t>(std::max_element(scores.begin(), scores.begin() + static_cast<std::ptrdiff_t>(n_labels)) -
                                              scores.begin());
            int32_t * const out = labels[group.sequences[i]];
            for (size_t t = length; t-- > 0;) {
                out[t] = label;
                label = t > 0 ? from[t * width + static_cast<size_t>(label)] : 0;
            }
        }
    }

    const sllm_tagger & tagger;
    const Code & kernels;
    std::vector<float> hidden; // rows of all sequences: embeddings, then the states of a layer
    std::vector<float> next;
    std::vector<float> sums;
    std::vector<float> states;
    std::vector<float> resets;
    std::vector<float> steps;
    std::vector<int32_t> from;
};

} // namespace

int sllm_tagger_load(const char * path, sllm_tagger ** tagger) {
    return sllm::guarded([&] {
        if (path == nullptr || tagger == nullptr) {
            sllm::fail(SLLM_ERR_INVALID, "path or tagger is NULL");
        }
        *tagger = read_tagger(path).release();
    });
}

void sllm_tagger_free(sllm_tagger * tagger) { delete tagger; }

int32_t sllm_tagger_n_labels(const sllm_tagger * tagger) { return tagger == nullptr ? 0 : static_cast<int32_t>(tagger->labels.size()); }

int32_t sllm_tagger_label(const sllm_tagger * tagger, int32_t index, char * text, int32_t size) {
    if (tagger == nullptr || index < 0 || static_cast<size_t>(index) >= tagger->labels.size()) {
        return -1;
    }
    return sllm::copy_text(tagger->labels[static_cast<size_t>(index)], text, size);
}

int sllm_tagger_run(const sllm_tagger * tagger, int32_t n_seqs, const int32_t * lengths, const uint32_t * chars, int32_t * labels) {
    return sllm::guarded([&] {
        if (tagger == nullptr || n_seqs < 0 || (n_seqs > 0 && (lengths == nullptr || chars == nullptr || labels == nullptr))) {
            sllm::fail(SLLM_ERR_INVALID, "no tagger, or no sequences");
        }
        const auto n = static_cast<size_t>(n_seqs);
        std::vector<const uint32_t *> texts(n);
        std::vector<int32_t *> outs(n);
        for (size_t i = 0; i < n; ++i) {
            if (lengths[i] < 0 || static_cast<size_t>(lengths[i]) > most_chars) {
                sllm::fail(SLLM_ERR_INVALID, "sequence %zu has %" PRId32 " characters, expected 0 to %zu", i, lengths[i], most_chars);
            }
            texts[i] = chars;
            outs[i] = labels;
            chars += lengths[i];
            labels += lengths[i];
        }
        Pass pass(*tagger);
        for (const Group & group : grouped(lengths, n)) {
            pass.run(group, texts.data(), outs.data());
        }
    });
}
