//! Waiting while another process drives the device. Where pods replace each other, the old one's process must not end when
//! it has passed the device on: it would be started again and take it back. It stays instead, for the case that its
//! successor vanishes before its pod is deleted.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// How often it looks, in milliseconds. Also a pause between a device's end and its new beginning, in which whoever
/// deleted it may put another in its place.
const LOOK: u16 = 250;

/// Waits until nobody serves `socket` (the UAPI's); false when told to end instead. SIGTERM and SIGINT stay blocked, so
/// that none is lost between this and what comes next.
pub fn wait(socket: &Path) -> io::Result<bool> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGINT);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    loop {
        match poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], PollTimeout::from(LOOK)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if signals.read_signal()?.is_some() {
            return Ok(false);
        }
        if !is_served(socket)? {
            return Ok(true);
        }
    }
}

/// Whether somebody answers on a socket.
pub fn is_served(socket: &Path) -> io::Result<bool> {
    match UnixStream::connect(socket) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(false),
        Err(e) => Err(e),
    }
}
