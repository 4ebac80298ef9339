//! What the worker may ask of the kernel once it is set up (seccomp(2)): what its threads do, and nothing that
//! would give whoever took it over more than packets. A call that is not on the list fails with EPERM.

use std::collections::BTreeMap;

use anyhow::Context as _;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Packets, files and memory that are there; threads, time, randomness; sockets by family (below); the UAPI's and the
/// hand-over's files; the end.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_ftruncate,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_close,
    libc::SYS_ioctl,
    libc::SYS_ppoll,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendto,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_memfd_create,
    libc::SYS_unlinkat,
    libc::SYS_umask,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_membarrier,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_geteuid,
    libc::SYS_prctl,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_tgkill,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Older names of some of them, which libraries still use where they exist.
#[cfg(target_arch = "x86_64")]
const OLD: &[libc::c_long] =
    &[libc::SYS_poll, libc::SYS_stat, libc::SYS_lstat, libc::SYS_unlink, libc::SYS_dup2, libc::SYS_time];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[libc::c_long] = &[];

/// Families of the sockets that may be made.
const FAMILIES: [libc::c_int; 3] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];

/// The filter, compiled for this machine.
pub fn filter() -> anyhow::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    rules.extend(ALLOWED.iter().chain(OLD).map(|call| (*call, Vec::new())));
    let family = |family: libc::c_int| {
        let same = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, family as u64)?;
        SeccompRule::new(vec![same])
    };
    let families: Result<_, seccompiler::BackendError> = FAMILIES.into_iter().map(family).collect();
    rules.insert(libc::SYS_socket, families?);
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    let arch = std::env::consts::ARCH.try_into().context("no filter for this machine")?;
    Ok(SeccompFilter::new(rules, refused, SeccompAction::Allow, arch)?.try_into()?)
}

/// Puts the filter on the process: on all threads there are, and those that they start.
pub fn enter() -> anyhow::Result<()> {
    seccompiler::apply_filter_all_threads(&filter()?).context("seccomp")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::net::UdpSocket;
    use std::process::Command;

    /// In a thread of its own, since a filter cannot be taken off again.
    #[test]
    fn what_a_worker_never_does_is_refused_and_what_it_does_is_not() {
        let run = || {
            nix::sys::prctl::set_no_new_privs().unwrap();
            seccompiler::apply_filter(&filter().unwrap()).unwrap();
            let errno = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
            let refused = Some(libc::EPERM);
            assert_eq!(errno(std::fs::read("/proc/self/status").map(drop)), refused, "opening a file");
            assert_eq!(errno(Command::new("/bin/true").spawn().map(drop)), refused, "starting a program");
            let netlink = socket2::Domain::from(libc::AF_NETLINK);
            let socket = socket2::Socket::new(netlink, socket2::Type::RAW, None);
            assert_eq!(errno(socket.map(drop)), refused, "talking to the kernel's network");
            let elsewhere = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
            assert_eq!(errno(elsewhere.map_err(Into::into)), refused, "another network");
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            udp.send_to(b"x", udp.local_addr().unwrap()).unwrap();
            assert_eq!(udp.recv(&mut [0; 2]).unwrap(), 1);
            std::thread::spawn(|| ()).join().unwrap();
        };
        std::thread::spawn(run).join().unwrap();
    }
}
