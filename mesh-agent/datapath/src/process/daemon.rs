//! Into the background, once the device answers.
#![allow(unsafe_code)] // fork(2): sound here because no thread exists yet.

use std::io::{self, PipeWriter, Read as _, Write as _};
use std::os::fd::AsFd;

use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid};

/// Told when the daemon is ready, so that its parent may end.
#[derive(Debug)]
pub struct Parent(PipeWriter);

impl Parent {
    /// Lets the parent end with success.
    pub fn ready(mut self) -> io::Result<()> {
        self.0.write_all(&[1])
    }
}

/// Forks: the child goes on as a session of its own; the parent waits for [`Parent::ready`] and exits with 0,
/// or with 1 when the child ends before. Must be called before any thread is started.
pub fn daemonize(keep_output: bool) -> io::Result<Parent> {
    let (mut reader, writer) = io::pipe()?;
    // SAFETY: the process has one thread, so the child inherits no lock that nobody releases.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => {
            drop(writer);
            let ready = reader.read(&mut [0]).unwrap_or(0) == 1;
            std::process::exit(i32::from(!ready));
        }
        ForkResult::Child => {
            drop(reader);
            setsid()?;
            std::env::set_current_dir("/")?;
            let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
            dup2_stdin(null.as_fd())?;
            if !keep_output {
                dup2_stdout(null.as_fd())?;
                dup2_stderr(null.as_fd())?;
            }
            Ok(Parent(writer))
        }
    }
}
