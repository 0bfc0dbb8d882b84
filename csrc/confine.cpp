// What a process can still do once it has said that it will do no more: Linux's Landlock and seccomp, for the one that serves
// strangers (rpc_server.cpp). Other systems have nothing like it that a library can rely on.

#include "internal.hpp"

#include <cerrno>
#include <cstddef>

#ifdef __linux__

#include <algorithm>
#include <dirent.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define SLLM_AUDIT_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define SLLM_AUDIT_ARCH AUDIT_ARCH_AARCH64
#endif

#ifndef SECCOMP_FILTER_FLAG_TSYNC
#define SECCOMP_FILTER_FLAG_TSYNC 1
#endif

namespace {

// ---- Landlock (linux/landlock.h, which systems to build on may not have) --------------------------------------------------------

constexpr long landlock_create_ruleset = 444; // the same number on every architecture
constexpr long landlock_add_rule = 445;
constexpr long landlock_restrict_self = 446;

constexpr uint64_t fs_write_file = 1 << 1;
constexpr uint64_t fs_read_file = 1 << 2;
constexpr uint64_t fs_read_dir = 1 << 3;
constexpr uint64_t fs_first_version = (1 << 13) - 1;
constexpr uint64_t fs_refer = 1 << 13;    // from version 2 on
constexpr uint64_t fs_truncate = 1 << 14; // 3
constexpr uint64_t net_tcp = 3;           // 4: to bind and to connect
constexpr uint64_t scopes = 3;            // 6: abstract Unix sockets, and signals to others

struct Ruleset {
    uint64_t files;
    uint64_t net;
    uint64_t scoped;
};

struct __attribute__((packed)) PathRule {
    uint64_t allowed;
    int32_t parent;
};

void allow(int ruleset, const char * path, uint64_t rights) {
    const int fd = open(path, O_PATH | O_CLOEXEC);
    if (fd < 0) {
        return; // what is not there cannot be opened
    }
    struct stat found{};
    if (fstat(fd, &found) == 0) {
        if (!S_ISDIR(found.st_mode)) {
            rights &= ~fs_read_dir;
        }
        const PathRule rule{rights, fd};
        syscall(landlock_add_rule, ruleset, 1 /* a path */, &rule, 0);
    }
    close(fd);
}

int n_threads() {
    DIR * tasks = opendir("/proc/self/task");
    if (tasks == nullptr) {
        return 0;
    }
    int n = 0;
    while (const dirent * entry = readdir(tasks)) {
        n += entry->d_name[0] != '.';
    }
    closedir(tasks);
    return n;
}

// The version of Landlock that holds from here on; 0: none does.
int restrict_files(const char * const * readable, int32_t n_readable, const char * const * writable, int32_t n_writable) {
    const long version = syscall(landlock_create_ruleset, nullptr, 0, 1 /* which version */);
    // It binds the thread that asks and those that it starts; one that is there already could do everything for it.
    if (version < 1 || n_threads() != 1) {
        return 0;
    }
    Ruleset wanted{fs_first_version | (version >= 2 ? fs_refer : 0) | (version >= 3 ? fs_truncate : 0), version >= 4 ? net_tcp : 0,
                   version >= 6 ? scopes : 0};
    const long made = syscall(landlock_create_ruleset, &wanted, sizeof wanted, 0);
    if (made < 0) {
        return 0;
    }
    const int ruleset = static_cast<int>(made);
    for (int32_t i = 0; i < n_readable; ++i) {
        allow(ruleset, readable[i], fs_read_file | fs_read_dir);
    }
    for (int32_t i = 0; i < n_writable; ++i) {
        allow(ruleset, writable[i], fs_read_file | fs_read_dir | fs_write_file);
    }
    const long status = syscall(landlock_restrict_self, ruleset, 0);
    close(ruleset);
    return status == 0 ? static_cast<int>(version) : 0;
}

bool drop_capabilities() {
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    std::array<__user_cap_data_struct, 2> none{};
    return syscall(SYS_capset, &header, none.data()) == 0;
}

// ---- seccomp --------------------------------------------------------------------------------------------------------------------

#ifdef SLLM_AUDIT_ARCH

constexpr uint32_t yes = SECCOMP_RET_ALLOW;
constexpr uint32_t denied = SECCOMP_RET_ERRNO | EPERM;
constexpr uint32_t clone_thread = 0x10000;

// Nothing of these is used to compute; with them, one program becomes another, or reaches others and the network.
constexpr long never[] = {
    SYS_execve,
    SYS_execveat,
    SYS_ptrace,
    SYS_process_vm_readv,
    SYS_process_vm_writev,
    SYS_socket,
    SYS_connect,
    SYS_bind,
    SYS_listen,
    SYS_accept,
    SYS_accept4,
    SYS_tkill,
    SYS_rt_sigqueueinfo,
    SYS_rt_tgsigqueueinfo,
    SYS_kcmp,
    SYS_bpf,
    SYS_perf_event_open,
    SYS_userfaultfd,
    SYS_keyctl,
    SYS_add_key,
    SYS_request_key,
    SYS_mount,
    SYS_umount2,
    SYS_pivot_root,
    SYS_chroot,
    SYS_unshare,
    SYS_setns,
    SYS_name_to_handle_at,
    SYS_open_by_handle_at,
    SYS_init_module,
    SYS_finit_module,
    SYS_delete_module,
    SYS_kexec_load,
    SYS_reboot,
    SYS_swapon,
    SYS_swapoff,
    SYS_personality,
    SYS_quotactl,
    SYS_acct,
    SYS_settimeofday,
    SYS_clock_settime,
    SYS_adjtimex,
    SYS_clock_adjtime,
    SYS_syslog,
    SYS_shmget,
    SYS_shmat,
    SYS_msgget,
    SYS_semget,
    SYS_mq_open,
    SYS_setuid,
    SYS_setgid,
    SYS_setreuid,
    SYS_setregid,
    SYS_setresuid,
    SYS_setresgid,
    SYS_setgroups,
    425 /* io_uring_setup: its requests pass no filter */,
    426 /* io_uring_enter */,
    427 /* io_uring_register */,
    424 /* pidfd_send_signal */,
    428 /* open_tree */,
    429 /* move_mount */,
    430 /* fsopen */,
    432 /* fsmount */,
    434 /* pidfd_open */,
    438 /* pidfd_getfd */,
    440 /* process_madvise */,
    442 /* mount_setattr */,
#ifdef __x86_64__
    SYS_fork,
    SYS_vfork,
    SYS_iopl,
    SYS_ioperm,
    SYS_modify_ldt,
#endif
};

constexpr long opening[] = {
    SYS_openat,    437 /* openat2 */, SYS_unlinkat, SYS_renameat, SYS_mkdirat,   SYS_linkat,
    SYS_symlinkat, SYS_truncate,      SYS_fchmodat, SYS_fchownat, SYS_renameat2,
#ifdef __x86_64__
    SYS_open,      SYS_creat,         SYS_unlink,   SYS_rename,   SYS_mkdir,     SYS_rmdir,
    SYS_link,      SYS_symlink,       SYS_chmod,    SYS_chown,
#endif
};

constexpr uint32_t at(size_t offset) { return static_cast<uint32_t>(offset); }
constexpr uint32_t number = at(offsetof(seccomp_data, nr));
constexpr uint32_t first = at(offsetof(seccomp_data, args)); // the low half: both architectures are little-endian

sock_filter load(uint32_t offset) { return {BPF_LD | BPF_W | BPF_ABS, 0, 0, offset}; }

// If the loaded word is `value`, go on, else jump over `n`.
sock_filter unless_equal(uint32_t value, uint8_t n) { return {BPF_JMP | BPF_JEQ | BPF_K, 0, n, value}; }

sock_filter end(uint32_t verdict) { return {BPF_RET | BPF_K, 0, 0, verdict}; }

void deny(std::vector<sock_filter> & filter, long call, uint32_t verdict = denied) {
    filter.push_back(unless_equal(static_cast<uint32_t>(call), 1));
    filter.push_back(end(verdict));
}

// Only where the first argument is `value`.
void only_with(std::vector<sock_filter> & filter, long call, uint32_t value) {
    filter.insert(filter.end(), {unless_equal(static_cast<uint32_t>(call), 4), load(first), unless_equal(value, 1), end(yes), end(denied)});
}

std::vector<sock_filter> calls_to_compute(bool files) {
    std::vector<sock_filter> filter{
        load(at(offsetof(seccomp_data, arch))), {BPF_JMP | BPF_JEQ | BPF_K, 1, 0, SLLM_AUDIT_ARCH}, end(denied), load(number)};
#ifdef __x86_64__
    // The numbers of the x32 ABI would pass by the list.
    filter.push_back({BPF_JMP | BPF_JGE | BPF_K, 0, 1, 0x40000000});
    filter.push_back(end(denied));
#endif
    for (const long call : never) {
        deny(filter, call);
    }
    if (!files) {
        for (const long call : opening) {
            deny(filter, call);
        }
    }
    // A thread is no process, which the old call tells by a flag. The new one hides it behind a pointer; the C library then takes the old.
    deny(filter, 435 /* clone3 */, SECCOMP_RET_ERRNO | ENOSYS);
    filter.insert(filter.end(),
                  {unless_equal(SYS_clone, 4), load(first), {BPF_JMP | BPF_JSET | BPF_K, 0, 1, clone_thread}, end(yes), end(denied)});
    const auto self = static_cast<uint32_t>(getpid());
    only_with(filter, SYS_kill, self);
    only_with(filter, SYS_tgkill, self);
    only_with(filter, SYS_prlimit64, 0);
    filter.push_back(end(yes));
    return filter;
}

bool restrict_calls(bool files) {
    std::vector<sock_filter> filter = calls_to_compute(files);
    const sock_fprog program{static_cast<unsigned short>(filter.size()), filter.data()};
    // For every thread: 0, or the first that could not be bound.
    return syscall(SYS_seccomp, 1 /* a filter */, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0;
}

#else

bool restrict_calls(bool) { return false; }

#endif

} // namespace

extern "C" {

int sllm_confine_files(const char * const * readable, int32_t n_readable, const char * const * writable, int32_t n_writable,
                       int32_t * landlock) {
    return sllm::guarded([&] {
        *landlock = 0;
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0) {
            drop_capabilities();
            *landlock = restrict_files(readable, n_readable, writable, n_writable);
        }
    });
}

int sllm_confine_calls(int32_t files, int32_t * confined) {
    return sllm::guarded([&] { *confined = restrict_calls(files != 0) ? 1 : 0; });
}

} // extern "C"

#else

extern "C" {

int sllm_confine_files(const char * const *, int32_t, const char * const *, int32_t, int32_t * landlock) {
    *landlock = 0;
    return SLLM_OK;
}

int sllm_confine_calls(int32_t, int32_t * confined) {
    *confined = 0;
    return SLLM_OK;
}

} // extern "C"

#endif
