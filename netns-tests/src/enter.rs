//! `mesh-lab enter`: a command inside a host or pod, its exit code passed through.
#![allow(unsafe_code)] // fork before any thread exists; exec in the child.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

/// Enters the namespaces of the holder `pid` (and of the pod's network namespace), runs the command and
/// returns its exit code, 128 + n when signal n ended it. The command dies with this process.
pub fn main(pid: i32, pod: Option<&str>, argv: &[String]) -> Result<i32> {
    let (program, arguments) = argv.split_first().context("no command given")?;
    let kinds = [
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("net", CloneFlags::CLONE_NEWNET),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    let mut files = Vec::new();
    for (kind, flag) in kinds {
        let path = format!("/proc/{pid}/ns/{kind}");
        files.push((File::open(&path).with_context(|| format!("open {path}: is the lab up?"))?, flag));
    }
    for (file, flag) in &files {
        setns(file.as_fd(), *flag).with_context(|| format!("enter {flag:?}"))?;
    }
    std::env::set_current_dir("/").context("cd /")?;
    if let Some(pod) = pod {
        let path = format!("/run/netns/{pod}");
        let file = File::open(&path).with_context(|| format!("open {path}"))?;
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET).context("enter the pod")?;
    }
    // SAFETY: no thread has been started in this process.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => loop {
            match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, code)) => return Ok(code),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => bail!("wait: {error}"),
            }
        },
        ForkResult::Child => {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("die with the parent")?;
            let error = Command::new(program).args(arguments).exec();
            eprintln!("mesh-lab: {program}: {error}");
            std::process::exit(127);
        }
    }
}
