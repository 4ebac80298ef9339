//! Waiting while the interface's name belongs to something else: kernel WireGuard, until the agent deletes it.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// RTMGRP_LINK (linux/rtnetlink.h): links that come, go or change.
const LINK_EVENTS: u32 = 1;

/// Watches links and the signals that end the wait. Must be made before any thread is started, and before the look at
/// the interface that is to be waited for.
#[derive(Debug)]
pub struct Standby {
    events: OwnedFd,
    mask: SigSet,
    signals: SignalFd,
}

impl Standby {
    /// From now on nothing is missed.
    pub fn begin() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let events = socket(AddressFamily::Netlink, SockType::Raw, flags, Some(SockProtocol::NetlinkRoute))?;
        bind(events.as_raw_fd(), &NetlinkAddr::new(0, LINK_EVENTS))?;
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGTERM);
        mask.add(Signal::SIGINT);
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { events, mask, signals })
    }

    /// Waits for links to change; false when told to end instead.
    pub fn wait(&mut self) -> io::Result<bool> {
        let mut fds = [
            PollFd::new(self.events.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if self.signals.read_signal()?.is_some() {
            return Ok(false);
        }
        // What changed is looked up. ENOBUFS says that it was much.
        let mut event = [0; 8192];
        loop {
            match recv(self.events.as_raw_fd(), &mut event, MsgFlags::empty()) {
                Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        let _ = self.mask.thread_unblock();
    }
}
