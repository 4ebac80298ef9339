//! Socket options that socket2 has no method for.
#![allow(unsafe_code)] // setsockopt(2)

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

fn set(socket: &impl AsFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let size = size_of_val(&value) as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open, and the pointer and size are of a live c_int.
    let result = unsafe { libc::setsockopt(fd, level, option, (&raw const value).cast(), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets datagrams be cut into fragments (ip(7) IP_MTU_DISCOVER).
pub(crate) fn dont_discover_mtu(socket: &impl AsFd, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)
    } else {
        set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
    }
}

/// Sets both buffers beyond the sysctl limits (socket(7) SO_RCVBUFFORCE); needs CAP_NET_ADMIN.
pub(crate) fn force_buffers(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    set(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes)?;
    set(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, bytes)
}
