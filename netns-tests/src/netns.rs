//! A network namespace by descriptor: run a closure or a command in it.
#![allow(unsafe_code)] // pre_exec runs a closure between fork and exec.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

/// Cheap to clone; the namespace lives at least as long as this does.
#[derive(Debug, Clone)]
pub struct Netns(Arc<File>);

impl Netns {
    /// Opens `/proc/PID/ns/net` or a bind mount under /run/netns.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self(Arc::new(File::open(path).with_context(|| format!("open {}", path.display()))?)))
    }

    /// Inode number, which names the namespace on this machine.
    pub fn inode(&self) -> Result<u64> {
        Ok(self.0.metadata().context("stat network namespace")?.ino())
    }

    /// Runs `f` on a thread of its own inside the namespace. Sockets made there stay there.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let worker = std::thread::Builder::new()
                .stack_size(256 * 1024)
                .spawn_scoped(scope, || {
                    setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET)?;
                    io::Result::Ok(f())
                })
                .context("start a thread")?;
            match worker.join() {
                Ok(result) => result.context("enter the network namespace"),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A command that runs in the namespace, with the machine's files and processes.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let namespace = Arc::clone(&self.0);
        // SAFETY: setns is a bare system call; nothing is allocated or locked between fork and exec.
        unsafe {
            command.pre_exec(move || {
                // SAFETY: the descriptor is owned by the Arc that the closure keeps.
                match libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        command
    }

    /// Runs `ip -batch` with the given lines, all or an error.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        use std::io::Write;
        let mut child = self
            .command("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("run ip (iproute2)")?;
        let mut text = lines.join("\n");
        text.push('\n');
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(text.as_bytes()).context("write to ip -batch")?;
        }
        let output = child.wait_with_output().context("wait for ip")?;
        if !output.status.success() {
            bail!("ip -batch: {} in:\n{text}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Writes a sysctl of the namespace, `net.ipv6.conf.all.disable_ipv6` style names with slashes.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{name}");
        self.run(|| std::fs::write(&path, value))?.with_context(|| format!("write {path}"))
    }
}
