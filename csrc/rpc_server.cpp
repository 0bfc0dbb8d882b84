// A server of ggml's RPC protocol that believes nothing that a client says.
//
// ggml has one of its own. It listens on a TCP port by itself, so every user of the machine could connect, and it computes what it
// is sent: operations that are pointers to functions, addresses of its own memory. This one is handed its connections, one at a
// time, by the process that has checked whose they are, and checks every number before it means anything:
//
// - Buffers have numbers and addresses of their own, which are looked up and translated; no address of this process leaves it.
// - A tensor lies in a buffer of this client, whole, or has no data. Sizes cannot wrap around.
// - Every request has the size that its command has. Graphs, buffers and memory have bounds.
// - Operations that call a function named in the request, and those of training, are refused.
//
// What it does not check is what only the kernels know: that the shapes of an operation go together, and that the numbers inside a
// tensor of indices are in range. A hostile client may still get the better of them, so the process is confined (confine.cpp).
//
// Files are not opened here either: the other process keeps the cache of weights and hands over open files.

#include "internal.hpp"

#include "ggml-backend.h"
#include "ggml-rpc.h"

// ggml does not install it. Without it graphs do not know how often a tensor is used, and nothing is fused.
#if __has_include("../ggml/src/ggml-impl.h")
#include "../ggml/src/ggml-impl.h"
#define SLLM_USE_COUNTS 1
#else
#define SLLM_USE_COUNTS 0
#endif

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <unordered_map>
#include <utility>

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif
#ifndef MSG_CMSG_CLOEXEC
#define MSG_CMSG_CLOEXEC 0
#endif

namespace {

// ---- the protocol, as ggml-rpc.cpp has it -----------------------------------------------------------------------------------

enum Command : uint8_t {
    ALLOC_BUFFER,
    GET_ALIGNMENT,
    GET_MAX_SIZE,
    BUFFER_GET_BASE,
    FREE_BUFFER,
    BUFFER_CLEAR,
    SET_TENSOR,
    SET_TENSOR_HASH,
    GET_TENSOR,
    COPY_TENSOR,
    GRAPH_COMPUTE,
    GET_DEVICE_MEMORY,
    INIT_TENSOR,
    GET_ALLOC_SIZE,
    HELLO,
    DEVICE_COUNT,
    GRAPH_RECOMPUTE,
    MEMSET_TENSOR,
};

#pragma pack(push, 1)

struct WireTensor {
    uint64_t id;
    uint32_t type;
    uint64_t buffer;
    uint32_t ne[GGML_MAX_DIMS];
    uint32_t nb[GGML_MAX_DIMS];
    uint32_t op;
    int32_t op_params[GGML_MAX_OP_PARAMS / sizeof(int32_t)];
    int32_t flags;
    uint64_t src[GGML_MAX_SRC];
    uint64_t view_src;
    uint64_t view_offs;
    uint64_t data;
    char name[GGML_MAX_NAME];
    int32_t use_count;
};

struct OnDevice {
    uint32_t device;
};

struct Alloc {
    uint32_t device;
    uint64_t size;
};

struct OnBuffer {
    uint64_t buffer;
};

struct Clear {
    uint64_t buffer;
    uint8_t value;
};

struct Memset {
    WireTensor tensor;
    uint64_t offset;
    uint64_t size;
    uint8_t value;
};

struct Set {
    WireTensor tensor;
    uint8_t keep;
    uint64_t offset;
};

// `name` is upstream's, FNV-1a of the bytes. sllm's clients send the SHA-256 as well, behind it.
struct Kept {
    WireTensor tensor;
    uint64_t offset;
    uint64_t name;
    uint8_t digest[32];
};

constexpr uint64_t kept_by_name = sizeof(Kept) - sizeof(Kept::digest);

struct Get {
    WireTensor tensor;
    uint64_t offset;
    uint64_t size;
};

struct Copy {
    WireTensor src;
    WireTensor dst;
};

struct AllocSize {
    uint32_t device;
    WireTensor tensor;
    WireTensor srcs[GGML_MAX_SRC];
};

struct Greeting {
    uint8_t version[3];
    uint8_t digests; // upstream's has padding here. 1: tensors in the cache can be asked for by their SHA-256
    uint8_t capabilities[24];
};

// Between this process and the one that hands out connections and keeps the cache; Python packs and unpacks both.
struct Ask {
    char kind;    // 'L' look up (by `digest`), 'N' look up (by `name`), 'S' store `size` bytes, 'C' they are written, 'A' give up, 'D' done
    uint8_t used; // of 'D': whether the client did more than look
    uint8_t unused[6];
    uint64_t size;
    uint64_t name;
    uint8_t digest[32];
};

struct Told {
    char kind; // 'N' a new connection (with its descriptor), 'Y' yes (with the descriptor of a file), '-' no
    uint8_t unused[7];
    uint64_t size; // of the file
};

#pragma pack(pop)

static_assert(sizeof(WireTensor) == 296 && sizeof(Greeting) == 28 && sizeof(Ask) == 56 && sizeof(Told) == 16, "as they are sent");

constexpr bool known_protocol = RPC_PROTO_MAJOR_VERSION == 7;

constexpr size_t max_buffers = 1 << 14;
constexpr uint32_t max_nodes = 1 << 17;
constexpr uint32_t max_tensors = 1 << 18;
constexpr uint64_t max_elements = uint64_t{1} << 48;
constexpr uint64_t max_copied = uint64_t{1} << 40; // bytes that one request carries

// A request that no llama.cpp would send; ends the connection.
struct Refused {
    const char * why;
};

// The other end has gone.
struct Gone {};

// ---- connections ------------------------------------------------------------------------------------------------------------

class Descriptor {
  public:
    explicit Descriptor(int number = -1) : fd(number) {}
    ~Descriptor() {
        if (fd >= 0) {
            close(fd);
        }
    }
    Descriptor(Descriptor && other) noexcept : fd(std::exchange(other.fd, -1)) {}
    Descriptor & operator=(Descriptor && other) noexcept {
        std::swap(fd, other.fd);
        return *this;
    }
    int get() const { return fd; }

  private:
    int fd;
};

class Stream {
  public:
    explicit Stream(int socket) : fd(socket), buffer(1 << 16) {}

    void read(void * to, size_t n) {
        auto * at = static_cast<uint8_t *>(to);
        const size_t ready = std::min(n, end - begin);
        if (ready > 0) {
            std::memcpy(at, buffer.data() + begin, ready);
            begin += ready;
            at += ready;
            n -= ready;
        }
        while (n >= buffer.size()) {
            const size_t got = receive(at, n);
            at += got;
            n -= got;
        }
        while (n > 0) {
            end = receive(buffer.data(), buffer.size());
            begin = std::min(n, end);
            std::memcpy(at, buffer.data(), begin);
            at += begin;
            n -= begin;
        }
    }

    template <class T> T read() {
        T value;
        read(&value, sizeof value);
        return value;
    }

    void skip(uint64_t n) {
        std::array<uint8_t, 4096> nowhere;
        while (n > 0) {
            const size_t part = std::min<uint64_t>(n, nowhere.size());
            read(nowhere.data(), part);
            n -= part;
        }
    }

    void answer(const void * data, uint64_t size) const {
        const auto * at = static_cast<const uint8_t *>(data);
        std::array<uint8_t, 8 + 64> small;
        std::memcpy(small.data(), &size, sizeof size);
        const size_t beside = std::min<uint64_t>(size, small.size() - 8); // one packet for most answers
        if (beside > 0) {
            std::memcpy(small.data() + 8, at, beside);
        }
        send_all(small.data(), 8 + beside);
        send_all(at + beside, size - beside);
    }

    template <class T> void answer(const T & value) const { answer(&value, sizeof value); }

  private:
    size_t receive(void * to, size_t n) const {
        ssize_t got;
        do {
            got = recv(fd, to, std::min(n, size_t{1} << 30), 0);
        } while (got < 0 && errno == EINTR);
        if (got <= 0) {
            throw Gone{};
        }
        return static_cast<size_t>(got);
    }

    void send_all(const void * data, uint64_t n) const {
        const auto * at = static_cast<const uint8_t *>(data);
        while (n > 0) {
            const ssize_t sent = send(fd, at, std::min(n, uint64_t{1} << 30), MSG_NOSIGNAL);
            if (sent < 0 && errno == EINTR) {
                continue;
            }
            if (sent <= 0) {
                throw Gone{};
            }
            at += sent;
            n -= static_cast<uint64_t>(sent);
        }
    }

    int fd;
    std::vector<uint8_t> buffer;
    size_t begin = 0;
    size_t end = 0;
};

// The way to the process that keeps the cache.
class Control {
  public:
    explicit Control(int socket) : fd(socket) {}

    void ask(const Ask & question) const {
        const auto * at = reinterpret_cast<const uint8_t *>(&question);
        size_t left = sizeof question;
        while (left > 0) {
            const ssize_t sent = send(fd, at, left, MSG_NOSIGNAL);
            if (sent < 0 && errno == EINTR) {
                continue;
            }
            if (sent <= 0) {
                throw Gone{};
            }
            at += sent;
            left -= static_cast<size_t>(sent);
        }
    }

    // The next message and the descriptor that comes with it.
    Told listen(Descriptor & file) const {
        Told told{};
        size_t have = 0;
        while (have < sizeof told) {
            iovec part{reinterpret_cast<uint8_t *>(&told) + have, sizeof told - have};
            alignas(cmsghdr) std::array<uint8_t, CMSG_SPACE(sizeof(int))> rights{};
            msghdr message{};
            message.msg_iov = &part;
            message.msg_iovlen = 1;
            message.msg_control = rights.data();
            message.msg_controllen = rights.size();
            const ssize_t got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
            if (got < 0 && errno == EINTR) {
                continue;
            }
            if (got <= 0) {
                throw Gone{};
            }
            const cmsghdr * head = CMSG_FIRSTHDR(&message);
            if (head != nullptr && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS) {
                int number;
                std::memcpy(&number, CMSG_DATA(head), sizeof number);
                file = Descriptor(number);
            }
            have += static_cast<size_t>(got);
        }
        return told;
    }

  private:
    int fd;
};

// ---- what a client has ------------------------------------------------------------------------------------------------------

struct FreeBuffer {
    void operator()(ggml_backend_buffer * p) const { ggml_backend_buffer_free(p); }
};

struct FreeBackend {
    void operator()(ggml_backend * p) const { ggml_backend_free(p); }
};

struct FreeTensors {
    void operator()(ggml_context * p) const { ggml_free(p); }
};

struct Buffer {
    std::unique_ptr<ggml_backend_buffer, FreeBuffer> memory;
    uint32_t device = 0;
    uint64_t size = 0;
    uint64_t base = 0;        // where the client sees it
    uint8_t * real = nullptr; // where it is
};

struct Device {
    std::unique_ptr<ggml_backend, FreeBackend> backend;
    ggml_backend_buffer_type_t memory = nullptr;
    uint64_t limit = 0; // bytes that one client may have
};

// A graph that may be computed again.
struct Graph {
    std::unique_ptr<ggml_context, FreeTensors> tensors;
    ggml_cgraph * graph = nullptr;
};

bool runs_foreign_code(uint32_t op) {
    switch (op) {
    case GGML_OP_MAP_CUSTOM1:
    case GGML_OP_MAP_CUSTOM2:
    case GGML_OP_MAP_CUSTOM3:
    case GGML_OP_CUSTOM: return true;
    default: return false;
    }
}

bool is_training(uint32_t op) {
    switch (op) {
    case GGML_OP_REPEAT_BACK:
    case GGML_OP_SILU_BACK:
    case GGML_OP_RMS_NORM_BACK:
    case GGML_OP_GET_ROWS_BACK:
    case GGML_OP_SOFT_MAX_BACK:
    case GGML_OP_ROPE_BACK:
    case GGML_OP_IM2COL_BACK:
    case GGML_OP_POOL_2D_BACK:
    case GGML_OP_FLASH_ATTN_BACK:
    case GGML_OP_CROSS_ENTROPY_LOSS:
    case GGML_OP_CROSS_ENTROPY_LOSS_BACK:
    case GGML_OP_OPT_STEP_ADAMW:
    case GGML_OP_OPT_STEP_SGD: return true;
    default: return false;
    }
}

// Whether an operation reads and writes no data.
bool is_empty(uint32_t op) {
    return op == GGML_OP_NONE || op == GGML_OP_VIEW || op == GGML_OP_RESHAPE || op == GGML_OP_PERMUTE || op == GGML_OP_TRANSPOSE;
}

void refuse_if(bool wrong, const char * why) {
    if (wrong) {
        throw Refused{why};
    }
}

// The bytes from a tensor's first to its last; refuses shapes that ggml's own sums would wrap around at.
uint64_t checked_bytes(const WireTensor & wire) {
    refuse_if(wire.type >= GGML_TYPE_COUNT, "a tensor of no type");
    const auto type = static_cast<ggml_type>(wire.type);
    const auto block = static_cast<uint64_t>(ggml_blck_size(type));
    refuse_if(block == 0, "a tensor of a type that is no more");
    refuse_if(wire.ne[0] % block != 0, "a tensor with part of a block");
    uint64_t elements = 1;
    for (const uint32_t n : wire.ne) {
        refuse_if(n > INT32_MAX, "a tensor that is too large");
        refuse_if(n > 0 && elements > max_elements / n, "a tensor that is too large");
        elements *= n;
    }
    if (elements == 0) {
        return 0;
    }
    uint64_t bytes = block == 1 ? ggml_type_size(type) + uint64_t{wire.ne[0] - 1} * wire.nb[0] : uint64_t{wire.ne[0]} * wire.nb[0] / block;
    for (int i = 1; i < GGML_MAX_DIMS; ++i) {
        bytes += uint64_t{wire.ne[i] - 1} * wire.nb[i]; // < 2**63 each
        refuse_if(bytes > uint64_t{1} << 56, "a tensor that is too large");
    }
    return bytes;
}

} // namespace

struct sllm_rpc_server {
    std::vector<Device> devices;
};

namespace {

// One client, from its greeting to its end.
class Client {
  public:
    Client(sllm_rpc_server & server_, const Control & control_, int connection, bool cache_)
        : server(server_), control(control_), stream(connection), cache(cache_), graphs(server_.devices.size()),
          taken(server_.devices.size()) {}

    void serve() {
        greet();
        for (;;) {
            const auto command = stream.read<uint8_t>();
            const auto size = stream.read<uint64_t>();
            run(command, size);
        }
    }

    // Whether it has had memory here; who has not cannot have done anything.
    bool used() const { return n_buffers > 0; }

  private:
    void greet() {
        refuse_if(stream.read<uint8_t>() != HELLO, "no greeting");
        refuse_if(stream.read<uint64_t>() != sizeof(Greeting::capabilities), "a greeting of another version");
        stream.skip(sizeof(Greeting::capabilities)); // RDMA alone, which this server does not have
        Greeting greeting{};
        greeting.version[0] = RPC_PROTO_MAJOR_VERSION;
        greeting.version[1] = RPC_PROTO_MINOR_VERSION;
        greeting.version[2] = RPC_PROTO_PATCH_VERSION;
        greeting.digests = cache ? 1 : 0;
        stream.answer(greeting);
    }

    template <class Request> Request request(uint64_t size) {
        refuse_if(size != sizeof(Request), "a request that has not the size of its command's");
        return stream.read<Request>();
    }

    void run(uint8_t command, uint64_t size) {
        switch (command) {
        case DEVICE_COUNT:
            refuse_if(size != 0, "a request that has not the size of its command's");
            return stream.answer(static_cast<uint32_t>(server.devices.size()));
        case ALLOC_BUFFER: return allocate(request<Alloc>(size));
        case GET_ALIGNMENT: return stream.answer(uint64_t{ggml_backend_buft_get_alignment(device(request<OnDevice>(size).device).memory)});
        case GET_MAX_SIZE: return stream.answer(uint64_t{ggml_backend_buft_get_max_size(device(request<OnDevice>(size).device).memory)});
        case BUFFER_GET_BASE: return stream.answer(buffer(request<OnBuffer>(size).buffer).base);
        case FREE_BUFFER: return release(request<OnBuffer>(size).buffer);
        case BUFFER_CLEAR: {
            const auto clear = request<Clear>(size);
            return ggml_backend_buffer_clear(buffer(clear.buffer).memory.get(), clear.value);
        }
        case SET_TENSOR: return set_tensor(size);
        case SET_TENSOR_HASH: return set_kept(size);
        case GET_TENSOR: return get_tensor(request<Get>(size));
        case COPY_TENSOR: return copy_tensor(request<Copy>(size));
        case GRAPH_COMPUTE: return compute_graph(size);
        case GRAPH_RECOMPUTE: {
            const uint32_t number = request<OnDevice>(size).device;
            device(number);
            refuse_if(graphs[number].graph == nullptr, "a graph again that was never computed");
            return compute(number);
        }
        case GET_DEVICE_MEMORY: return tell_memory(request<OnDevice>(size).device);
        case INIT_TENSOR: return init_tensor(request<WireTensor>(size));
        case GET_ALLOC_SIZE: return tell_alloc_size(size);
        case MEMSET_TENSOR: return memset_tensor(request<Memset>(size));
        default: throw Refused{"no command"};
        }
    }

    // ---- buffers

    Device & device(uint32_t number) {
        refuse_if(number >= server.devices.size(), "no such device");
        return server.devices[number];
    }

    Buffer & buffer(uint64_t id) {
        const auto found = buffers.find(id);
        refuse_if(found == buffers.end(), "no such buffer");
        return found->second;
    }

    void allocate(const Alloc & wanted) {
        Device & on = device(wanted.device);
        std::array<uint64_t, 2> answer{0, 0}; // its number (0: there is no memory for it) and size
        if (buffers.size() < max_buffers && wanted.size <= on.limit - taken[wanted.device]) {
            Buffer made;
            made.memory.reset(ggml_backend_buft_alloc_buffer(on.memory, wanted.size));
            if (made.memory != nullptr) {
                made.device = wanted.device;
                made.size = ggml_backend_buffer_get_size(made.memory.get());
                made.real = made.size == 0 ? nullptr : static_cast<uint8_t *>(ggml_backend_buffer_get_base(made.memory.get()));
                // With room between them, and on a boundary that is one for the real address, too.
                made.base = next_base;
                next_base += ((made.size >> 20) + 2) << 20;
                answer = {++n_buffers, made.size};
                taken[wanted.device] += std::min(made.size, on.limit - taken[wanted.device]);
                buffers.emplace(n_buffers, std::move(made));
            }
        }
        stream.answer(answer);
    }

    void release(uint64_t id) {
        Buffer & old = buffer(id);
        for (Graph & graph : graphs) { // they point into it
            graph = Graph{};
        }
        taken[old.device] -= std::min(old.size, taken[old.device]);
        buffers.erase(id);
    }

    void tell_memory(uint32_t number) {
        size_t available = 0;
        size_t total = 0;
        ggml_backend_dev_memory(ggml_backend_get_device(device(number).backend.get()), &available, &total);
        stream.answer(std::array<uint64_t, 2>{available, total});
    }

    // ---- tensors

    static ggml_context * room_for(size_t n_tensors, size_t more = 0) {
        ggml_context * made = ggml_init({ggml_tensor_overhead() * n_tensors + more, nullptr, true});
        if (made == nullptr) {
            throw std::bad_alloc();
        }
        return made;
    }

    // The tensor that is described, whole inside its buffer; without data where it has none, or one that is not of this client.
    ggml_tensor * tensor(ggml_context * context, const WireTensor & wire) {
        const uint64_t bytes = checked_bytes(wire);
        ggml_tensor * made = ggml_new_tensor_4d(context, static_cast<ggml_type>(wire.type), wire.ne[0], wire.ne[1], wire.ne[2], wire.ne[3]);
        std::copy(std::begin(wire.nb), std::end(wire.nb), made->nb);
        refuse_if(wire.op >= GGML_OP_COUNT, "no operation");
        made->op = static_cast<ggml_op>(wire.op);
        std::copy(std::begin(wire.op_params), std::end(wire.op_params), made->op_params);
        made->flags = wire.flags;
        std::memcpy(made->name, wire.name, sizeof made->name);
        made->name[sizeof made->name - 1] = '\0';
        const auto found = wire.buffer == 0 ? buffers.end() : buffers.find(wire.buffer);
        if (found == buffers.end()) {
            refuse_if(wire.data != 0, "a tensor with data in no buffer");
            return made;
        }
        const Buffer & in = found->second;
        refuse_if(wire.data < in.base || wire.data - in.base > in.size || bytes > in.size - (wire.data - in.base),
                  "a tensor outside its buffer");
        made->buffer = in.memory.get();
        made->data = in.real + (wire.data - in.base);
        return made;
    }

    // A tensor that is to be read or written from `offset` on.
    ggml_tensor * tensor_with(ggml_context * context, const WireTensor & wire, uint64_t offset, uint64_t size) {
        ggml_tensor * made = tensor(context, wire);
        refuse_if(made->buffer == nullptr, "a tensor without data");
        const uint64_t bytes = ggml_nbytes(made);
        refuse_if(offset > bytes || size > bytes - offset, "bytes outside a tensor");
        return made;
    }

    void set_tensor(uint64_t size) {
        refuse_if(size < sizeof(Set), "a tensor that is not there");
        refuse_if(size > max_copied, "a tensor that is too large");
        const auto set = stream.read<Set>();
        const uint64_t n = size - sizeof(Set);
        const std::unique_ptr<ggml_context, FreeTensors> room(room_for(1));
        ggml_tensor * to = tensor_with(room.get(), set.tensor, set.offset, n);
        Descriptor file;
        if (cache && set.keep != 0 && n > 0) {
            Ask store{};
            store.kind = 'S';
            store.size = n;
            control.ask(store);
            control.listen(file);
        }
        const uint8_t * data;
        if (ggml_backend_buffer_is_host(to->buffer)) {
            uint8_t * place = static_cast<uint8_t *>(to->data) + set.offset;
            stream.read(place, n);
            data = place;
        } else {
            received.resize(std::max<size_t>(received.size(), n));
            stream.read(received.data(), n);
            ggml_backend_tensor_set(to, received.data(), set.offset, n);
            data = received.data();
        }
        if (file.get() >= 0) {
            Ask end{};
            end.kind = write_all(file.get(), data, n) ? 'C' : 'A';
            end.size = n;
            file = Descriptor();
            control.ask(end);
        }
        shrink();
    }

    // A tensor of the cache. The other process has made sure that it is what its name says.
    void set_kept(uint64_t size) {
        refuse_if(size != sizeof(Kept) && size != kept_by_name, "a request that has not the size of its command's");
        Kept kept{};
        stream.read(&kept, size);
        const std::unique_ptr<ggml_context, FreeTensors> room(room_for(1));
        ggml_tensor * to = tensor_with(room.get(), kept.tensor, kept.offset, 0);
        uint8_t answer = 0;
        if (cache) {
            Ask lookup{};
            lookup.kind = size == sizeof(Kept) ? 'L' : 'N';
            lookup.name = kept.name;
            lookup.size = ggml_nbytes(to) - kept.offset;
            std::memcpy(lookup.digest, kept.digest, sizeof lookup.digest);
            control.ask(lookup);
            Descriptor file;
            const Told told = control.listen(file);
            if (told.kind == 'Y' && file.get() >= 0 && told.size <= lookup.size) {
                answer = load(file.get(), to, kept.offset, told.size) ? 1 : 0;
            }
        }
        stream.answer(answer);
        shrink();
    }

    bool load(int file, ggml_tensor * to, uint64_t offset, uint64_t n) {
        if (ggml_backend_buffer_is_host(to->buffer)) {
            return read_all(file, static_cast<uint8_t *>(to->data) + offset, n);
        }
        received.resize(std::max<size_t>(received.size(), n));
        if (!read_all(file, received.data(), n)) {
            return false;
        }
        ggml_backend_tensor_set(to, received.data(), offset, n);
        return true;
    }

    static bool write_all(int file, const uint8_t * data, uint64_t n) {
        while (n > 0) {
            const ssize_t written = write(file, data, std::min(n, uint64_t{1} << 30));
            if (written < 0 && errno == EINTR) {
                continue;
            }
            if (written <= 0) {
                return false; // the disk is full
            }
            data += written;
            n -= static_cast<uint64_t>(written);
        }
        return true;
    }

    static bool read_all(int file, uint8_t * data, uint64_t n) {
        while (n > 0) {
            const ssize_t got = ::read(file, data, std::min(n, uint64_t{1} << 30));
            if (got < 0 && errno == EINTR) {
                continue;
            }
            if (got <= 0) {
                return false;
            }
            data += got;
            n -= static_cast<uint64_t>(got);
        }
        return true;
    }

    void get_tensor(const Get & get) {
        const std::unique_ptr<ggml_context, FreeTensors> room(room_for(1));
        const ggml_tensor * from = tensor_with(room.get(), get.tensor, get.offset, get.size);
        if (ggml_backend_buffer_is_host(from->buffer)) {
            return stream.answer(static_cast<const uint8_t *>(from->data) + get.offset, get.size);
        }
        received.resize(std::max<size_t>(received.size(), get.size));
        ggml_backend_tensor_get(from, received.data(), get.offset, get.size);
        stream.answer(received.data(), get.size);
        shrink();
    }

    void copy_tensor(const Copy & copy) {
        const std::unique_ptr<ggml_context, FreeTensors> room(room_for(2));
        const ggml_tensor * src = tensor_with(room.get(), copy.src, 0, 0);
        ggml_tensor * dst = tensor_with(room.get(), copy.dst, 0, 0);
        // Where they differ, "no" makes the client copy it through its own memory.
        const bool alike = src->type == dst->type && std::equal(std::begin(src->ne), std::end(src->ne), std::begin(dst->ne)) &&
                           std::equal(std::begin(src->nb), std::end(src->nb), std::begin(dst->nb));
        if (alike) {
            ggml_backend_tensor_copy(src, dst);
        }
        stream.answer(static_cast<uint8_t>(alike));
    }

    void memset_tensor(const Memset & set) {
        const std::unique_ptr<ggml_context, FreeTensors> room(room_for(1));
        ggml_tensor * to = tensor_with(room.get(), set.tensor, set.offset, set.size);
        ggml_backend_tensor_memset(to, set.value, set.offset, set.size);
    }

    void init_tensor(const WireTensor & wire) {
        const std::unique_ptr<ggml_context, FreeTensors> room(room_for(1));
        ggml_tensor * made = tensor_with(room.get(), wire, 0, 0);
        // Backends clear what lies behind the last row of quantised tensors, up to the size that they want for it.
        const uint64_t wanted = ggml_backend_buft_get_alloc_size(ggml_backend_buffer_get_type(made->buffer), made);
        const Buffer & in = buffer(wire.buffer);
        refuse_if(wanted > in.size - (wire.data - in.base), "a tensor outside its buffer");
        refuse_if(ggml_backend_buffer_init_tensor(made->buffer, made) != GGML_STATUS_SUCCESS || made->extra != nullptr,
                  "a tensor that this backend cannot serve");
    }

    void tell_alloc_size(uint64_t size) {
        refuse_if(size != sizeof(AllocSize), "a request that has not the size of its command's");
        const auto asked = std::make_unique<AllocSize>(stream.read<AllocSize>());
        ggml_backend_buffer_type_t memory = device(asked->device).memory;
        const std::unique_ptr<ggml_context, FreeTensors> room(room_for(1 + GGML_MAX_SRC));
        ggml_tensor * about = tensor(room.get(), asked->tensor);
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            if (asked->srcs[i].id != 0) {
                about->src[i] = tensor(room.get(), asked->srcs[i]);
            }
        }
        if (about->buffer != nullptr) {
            memory = ggml_backend_buffer_get_type(about->buffer);
        }
        stream.answer(uint64_t{ggml_backend_buft_get_alloc_size(memory, about)});
    }

    // ---- graphs

    void compute_graph(uint64_t size) {
        constexpr uint64_t numbers = 3 * sizeof(uint32_t);
        refuse_if(size < numbers || size > numbers + sizeof(uint64_t) * max_nodes + sizeof(WireTensor) * uint64_t{max_tensors},
                  "a graph that is too large");
        const auto number = stream.read<uint32_t>();
        const auto n_nodes = stream.read<uint32_t>();
        device(number);
        refuse_if(n_nodes == 0 || n_nodes > max_nodes || size < numbers + sizeof(uint64_t) * n_nodes, "a graph with too many nodes");
        std::vector<uint64_t> nodes(n_nodes);
        stream.read(nodes.data(), sizeof(uint64_t) * n_nodes);
        const auto n_tensors = stream.read<uint32_t>();
        refuse_if(n_tensors > max_tensors || size != numbers + sizeof(uint64_t) * n_nodes + sizeof(WireTensor) * uint64_t{n_tensors},
                  "a graph that has not the size that it says");
        std::vector<WireTensor> wires(n_tensors);
        stream.read(wires.data(), sizeof(WireTensor) * n_tensors);

        Graph & graph = graphs[number];
        graph = Graph{};
        graph.tensors.reset(room_for(n_tensors, ggml_graph_overhead_custom(n_nodes, false)));
        std::unordered_map<uint64_t, std::pair<const WireTensor *, ggml_tensor *>> known;
        known.reserve(n_tensors);
        for (const WireTensor & wire : wires) {
            refuse_if(wire.id == 0 || !known.emplace(wire.id, std::pair{&wire, tensor(graph.tensors.get(), wire)}).second,
                      "two tensors with one name");
        }
        for (auto & [id, pair] : known) {
            link(*pair.first, *pair.second, known);
        }
        ggml_cgraph * made = ggml_new_graph_custom(graph.tensors.get(), n_nodes, false);
        for (const uint64_t id : nodes) {
            const auto found = known.find(id);
            refuse_if(found == known.end() || found->second.first == nullptr, "a node that is not there, or there twice");
            check_node(*found->second.second);
            ggml_graph_add_node(made, found->second.second);
#if SLLM_USE_COUNTS
            const size_t slot = ggml_hash_insert(&made->visited_hash_set, found->second.second);
            made->use_counts[slot] = found->second.first->use_count;
#endif
            found->second.first = nullptr;
        }
        graph.graph = made;
        compute(number);
    }

    using Known = std::unordered_map<uint64_t, std::pair<const WireTensor *, ggml_tensor *>>;

    static ggml_tensor * named(const Known & known, uint64_t id) {
        if (id == 0) {
            return nullptr;
        }
        const auto found = known.find(id);
        refuse_if(found == known.end(), "a source that is not there");
        return found->second.second;
    }

    static void link(const WireTensor & wire, ggml_tensor & made, const Known & known) {
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            made.src[i] = named(known, wire.src[i]);
        }
        made.view_src = named(known, wire.view_src);
        made.view_offs = wire.view_offs;
        refuse_if(made.view_src != nullptr && known.at(wire.view_src).first->view_src != 0, "a view of a view");
    }

    static void check_node(const ggml_tensor & node) {
        refuse_if(runs_foreign_code(node.op), "an operation that names a function to call");
        refuse_if(is_training(node.op), "an operation of training");
        if (is_empty(node.op)) {
            return;
        }
        refuse_if(node.data == nullptr && ggml_nelements(&node) > 0, "an operation without room for its result");
        for (const ggml_tensor * src : node.src) {
            refuse_if(src != nullptr && src->data == nullptr && ggml_nelements(src) > 0, "an operation on data in no buffer");
        }
    }

    void compute(uint32_t number) {
        const ggml_status status = ggml_backend_graph_compute(server.devices[number].backend.get(), graphs[number].graph);
        refuse_if(status != GGML_STATUS_SUCCESS, "a graph that could not be computed");
    }

    // Memory of one large tensor is not kept for the life of a text.
    void shrink() {
        if (received.size() > size_t{64} << 20) {
            std::vector<uint8_t>().swap(received);
        }
    }

    sllm_rpc_server & server;
    const Control & control;
    Stream stream;
    bool cache;
    std::unordered_map<uint64_t, Buffer> buffers; // by number
    uint64_t n_buffers = 0;                       // made so far
    uint64_t next_base = uint64_t{1} << 32;
    std::vector<Graph> graphs;   // of each device, the last one
    std::vector<uint64_t> taken; // bytes of each device
    std::vector<uint8_t> received;
};

// Returns whether the client has had memory here.
bool serve(sllm_rpc_server & server, const Control & control, const Descriptor & connection, bool cache) {
    Client client(server, control, connection.get(), cache);
    try {
        client.serve();
    } catch (const Gone &) {
        // A client that hangs up is done.
    } catch (const Refused & refused) {
        std::fprintf(stderr, "a client was refused: it sent %s\n", refused.why);
    } catch (const std::bad_alloc &) {
        std::fprintf(stderr, "a client was refused: there is no memory for what it sent\n");
    }
    return client.used();
}

} // namespace

extern "C" {

int sllm_rpc_server_open(int32_t n_threads, const int32_t * devices, int32_t n_devices, sllm_rpc_server ** server, uint64_t * memory) {
    return sllm::guarded([&] {
        if (!known_protocol) {
            sllm::fail(SLLM_ERR_UNSUPPORTED, "this build's llama.cpp has version %d of the RPC protocol, and sllm serves version 7",
                       RPC_PROTO_MAJOR_VERSION);
        }
        auto made = std::make_unique<sllm_rpc_server>();
        for (int32_t i = 0; i < n_devices; ++i) {
            ggml_backend_dev_t device = sllm::device_at(devices[i]);
            Device opened;
            opened.backend.reset(ggml_backend_dev_init(device, nullptr));
            if (opened.backend == nullptr) {
                sllm::fail(SLLM_ERR_INTERNAL, "%s cannot be used", ggml_backend_dev_name(device));
            }
            ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(device);
            if (void * set = ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
                reinterpret_cast<ggml_backend_set_n_threads_t>(set)(opened.backend.get(), std::max(n_threads, 1));
            }
            opened.memory = ggml_backend_get_default_buffer_type(opened.backend.get());
            size_t available = 0;
            size_t total = 0;
            ggml_backend_dev_memory(device, &available, &total);
            opened.limit = total == 0 ? UINT64_MAX : total; // some backends do not tell
            memory[2 * i] = available;
            memory[2 * i + 1] = total;
            made->devices.push_back(std::move(opened));
        }
        if (made->devices.empty()) {
            sllm::fail(SLLM_ERR_INVALID, "an RPC server needs a device to serve");
        }
        *server = made.release();
    });
}

int sllm_rpc_server_run(sllm_rpc_server * server, int32_t socket, int32_t cache, int32_t once) {
    return sllm::guarded([&] {
        const Control control(socket);
        try {
            for (;;) {
                Descriptor connection;
                if (control.listen(connection).kind != 'N' || connection.get() < 0) {
                    sllm::fail(SLLM_ERR_INVALID, "expected a connection");
                }
                Ask done{};
                done.kind = 'D';
                done.used = serve(*server, control, connection, cache != 0) ? 1 : 0;
                connection = Descriptor();
                control.ask(done);
                if (once != 0 && done.used != 0) {
                    return;
                }
            }
        } catch (const Gone &) {
            // So is whoever started this.
        }
    });
}

void sllm_rpc_server_free(sllm_rpc_server * server) { delete server; }

} // extern "C"
