// Errors, llama.cpp's log, and facts about the build.

#include "internal.hpp"

#include "ggml-backend.h"

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>

#ifndef _WIN32
#include <pthread.h>
#endif

#ifndef SLLM_VERSION_STRING
#define SLLM_VERSION_STRING "unknown"
#endif
#ifndef SLLM_LLAMA_CPP_COMMIT
#define SLLM_LLAMA_CPP_COMMIT "unknown"
#endif

#ifndef _WIN32
// OpenMP's, the first one of 5.0; null in builds of ggml without it.
extern "C" int omp_pause_resource_all(int kind) __attribute__((weak));
extern "C" int omp_in_parallel(void) __attribute__((weak));
#endif

namespace {

struct LogLine {
    int32_t level;
    std::string text;
};

constexpr size_t max_log_lines = 1000;

thread_local std::string last_error;
thread_local std::string error_lines; // llama.cpp's error log of this thread since the outermost Guard
thread_local int guard_depth = 0;
thread_local int32_t last_log_level = 0;

std::mutex log_mutex;
std::deque<LogLine> log_lines;
std::atomic<int32_t> log_min_level{3};

// What llama.cpp logs, as warnings and errors, when our own abort callback stops a decode. The caller knows.
bool tells_of_abort(const char * text) {
    for (const char * words :
         {"removing memory module entries", "graph_compute_async failed with error 1", "compute status: 1", "failed to decode, ret = 2"}) {
        if (std::strstr(text, words) != nullptr) {
            return true;
        }
    }
    return false;
}

void on_log(ggml_log_level level, const char * text, void * /*user_data*/) {
    // ggml numbers its levels 1 debug, 2 info, 3 warning, 4 error, 5 "continues the line before".
    const bool continues = level == GGML_LOG_LEVEL_CONT;
    const int32_t rank = continues ? last_log_level : static_cast<int32_t>(level);
    last_log_level = rank;
    if (tells_of_abort(text)) {
        return;
    }
    if (rank >= GGML_LOG_LEVEL_ERROR && guard_depth > 0 && error_lines.size() < 4096) {
        error_lines += text;
    }
    if (rank < log_min_level.load(std::memory_order_relaxed)) {
        return;
    }
    const std::lock_guard<std::mutex> lock(log_mutex);
    if (continues && !log_lines.empty()) {
        log_lines.back().text += text;
        return;
    }
    log_lines.push_back({rank, text});
    if (log_lines.size() > max_log_lines) {
        log_lines.pop_front();
    }
}

bool others_compute() {
#ifndef _WIN32
    return omp_in_parallel != nullptr && omp_in_parallel() != 0;
#else
    return false;
#endif
}

// GGML_ABORT and GGML_ASSERT come here. Inside a Guard the calling thread unwinds to the C boundary, unless it is one of several that
// compute: the others would go on with memory that is being freed, or wait for this one for ever. On such a thread, and on a worker of
// ggml's, there is nobody to tell, and ggml goes on to abort(). What a damaged file could cause of that is found out before
// (graph_check.cpp).
void on_abort(const char * message) {
    if (guard_depth > 0 && !others_compute()) {
        throw sllm::Error(SLLM_ERR_INTERNAL, std::string("llama.cpp gave up: ") + message);
    }
    std::fprintf(stderr, "%s\n", message);
}

std::atomic<int> threads_inside{0}; // with a Guard
std::atomic<bool> stopping{false};

std::atomic<sllm_interrupt_callback> interrupt_callback{nullptr};
std::atomic<void *> interrupt_user_data{nullptr};

#ifndef _WIN32
// libgomp keeps a pool of threads for each thread that uses it. In a forked child the pool is still on record and its threads are
// gone, so that the child's first parallel region would wait for ever: dissolve it before the fork. It comes back with the next
// region.
void before_fork() {
    if (omp_pause_resource_all != nullptr) {
        omp_pause_resource_all(2 /* omp_pause_hard */);
    }
}
#endif

struct InstallCallbacks {
    InstallCallbacks() {
#ifndef _WIN32
        pthread_atfork(before_fork, nullptr, nullptr);
#endif
        llama_log_set(on_log, nullptr);
        ggml_set_abort_callback(on_abort);
        // In place of llama_backend_init(), which does the same and then, where no backend is there yet, loads whatever lies under the
        // names of ggml's modules beside the executable or in the current folder.
        ggml_time_init();
        ggml_free(ggml_init({0, nullptr, false})); // fills ggml's tables
#ifdef SLLM_SYSTEM_BACKENDS
        ggml_backend_load_all_from_path(SLLM_SYSTEM_BACKENDS);
#endif
    }
};

} // namespace

namespace sllm {

void fail(int status, const char * format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    throw Error(status, text);
}

void set_last_error(const std::string & text) { last_error = text; }

int status_of_current_exception() noexcept {
    try {
        throw;
    } catch (const Error & error) {
        set_last_error(error.text);
        return error.status;
    } catch (const std::bad_alloc &) {
        set_last_error("out of memory");
        return SLLM_ERR_NO_MEMORY;
    } catch (const std::exception & error) {
        set_last_error(error.what());
        return SLLM_ERR_INTERNAL;
    } catch (...) {
        set_last_error("an unknown exception in llama.cpp");
        return SLLM_ERR_INTERNAL;
    }
}

Guard::Guard() {
    static const InstallCallbacks installed;
    if (guard_depth++ == 0) {
        threads_inside.fetch_add(1);
        error_lines.clear();
    }
}

Guard::~Guard() {
    if (--guard_depth == 0) {
        threads_inside.fetch_sub(1);
    }
}

bool shutting_down() { return stopping.load(std::memory_order_relaxed); }

std::string Guard::logged_errors() {
    // One line: what llama.cpp says is joined, so that the message of an exception stays one.
    std::string joined;
    for (const char c : error_lines) {
        if (c == '\n') {
            if (!joined.empty() && joined.back() != ' ') {
                joined += "; ";
            }
        } else {
            joined += c;
        }
    }
    while (!joined.empty() && (joined.back() == ' ' || joined.back() == ';')) {
        joined.pop_back();
    }
    return joined;
}

int32_t copy_text(const std::string & text, char * buffer, int32_t size) {
    if (buffer != nullptr && size > 0) {
        const size_t n = std::min(text.size(), static_cast<size_t>(size) - 1);
        std::memcpy(buffer, text.data(), n);
        buffer[n] = '\0';
    }
    return static_cast<int32_t>(text.size());
}

bool interrupted() {
    // The callback takes Python's lock, so it is asked rarely; reading the clock is rarer than that where graph nodes are short.
    using clock = std::chrono::steady_clock;
    static thread_local bool disabled = false;
    static thread_local int countdown = 0;
    static thread_local clock::time_point last_look{};
    static thread_local clock::time_point last_call{};

    const sllm_interrupt_callback callback = interrupt_callback.load(std::memory_order_acquire);
    if (disabled || callback == nullptr || --countdown > 0) {
        return false;
    }
    const auto now = clock::now();
    const bool slow = now - last_look > std::chrono::milliseconds(10);
    countdown = slow ? 1 : 32;
    last_look = now;
    if (now - last_call < std::chrono::milliseconds(100)) {
        return false;
    }
    last_call = now;
    switch (callback(interrupt_user_data.load(std::memory_order_acquire))) {
    case 0: return false;
    case 2: disabled = true; return false;
    default: return true;
    }
}

} // namespace sllm

extern "C" {

const char * sllm_last_error(void) { return last_error.c_str(); }

const char * sllm_version(void) { return SLLM_VERSION_STRING; }

const char * sllm_llama_cpp_commit(void) { return SLLM_LLAMA_CPP_COMMIT; }

int sllm_backend_load(const char * path) {
    return sllm::guarded([&] {
        if (ggml_backend_load(path) == nullptr) {
            const std::string lines = sllm::Guard::logged_errors();
            throw sllm::Error(SLLM_ERR_LOAD, lines.empty() ? "it does not support this machine" : lines);
        }
    });
}

const char * sllm_system_info(void) {
    try {
        const sllm::Guard guard;
        return llama_print_system_info();
    } catch (...) {
        return "";
    }
}

void sllm_set_interrupt_callback(sllm_interrupt_callback callback, void * user_data) {
    interrupt_user_data.store(user_data, std::memory_order_release);
    interrupt_callback.store(callback, std::memory_order_release);
}

void sllm_shutdown(void) {
    stopping.store(true);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(2);
    while (threads_inside.load() > 0 && std::chrono::steady_clock::now() < deadline) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

void sllm_log_set_level(int32_t min_level) { log_min_level.store(min_level, std::memory_order_relaxed); }

int32_t sllm_log_next(char * text, int32_t size) {
    const std::lock_guard<std::mutex> lock(log_mutex);
    if (log_lines.empty()) {
        return 0;
    }
    const LogLine line = std::move(log_lines.front());
    log_lines.pop_front();
    sllm::copy_text(line.text, text, size);
    return line.level;
}

} // extern "C"
