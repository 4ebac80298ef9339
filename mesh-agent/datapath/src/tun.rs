//! The TUN device (Linux Documentation/networking/tuntap.rst).
#![allow(unsafe_code)] // ioctl(2) has no safe wrapper for TUN.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use crate::device::DEFAULT_MTU;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;

/// What went wrong with a TUN device.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// Not 1 to 15 bytes, or with a character that the kernel or a path takes for something else.
    #[error("{0:?} is no interface name: 1 to 15 bytes, no '/', '%' or blank")]
    Name(String),
    /// Another process is attached to it.
    #[error("interface {0} is in use by another process")]
    Busy(String),
    /// An interface of this name exists and is something else.
    #[error("interface {0} exists and is no TUN device (or was made with other flags)")]
    NotTun(String),
    /// Some call failed.
    #[error("interface {name}: {call}: {source}")]
    Call {
        /// The interface.
        name: String,
        /// What was tried.
        call: &'static str,
        /// With its errno.
        source: io::Error,
    },
}

/// An attached TUN device: reads and writes IP packets without a header, without blocking.
#[derive(Debug)]
pub struct Tun {
    name: String,
    file: File,
    /// Any socket, for interface ioctls in the namespace where the device was made.
    control: OwnedFd,
}

/// Whether `name` can be an interface's name and part of a path.
pub fn check_name(name: &str) -> Result<(), TunError> {
    let fine = (1..libc::IFNAMSIZ).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b'%' | b':'));
    if fine { Ok(()) } else { Err(TunError::Name(name.to_owned())) }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data, for which all zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // Names are checked to be shorter than the field, so a zero follows.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

impl Tun {
    /// Attaches to the TUN device `name`, which is made if there is none.
    pub fn open(name: &str) -> Result<Self, TunError> {
        check_name(name)?;
        let call = |call| move |source| TunError::Call { name: name.to_owned(), call, source };
        let control = control_socket().map_err(call("socket"))?;
        let existed = nix::net::if_::if_nametoindex(name).is_ok();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(call("open /dev/net/tun"))?;
        let tun = Self { name: name.to_owned(), file, control };
        let mut attach = request(name);
        attach.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: the descriptor is open and TUNSETIFF reads and writes one ifreq.
        let result = unsafe { libc::ioctl(tun.file.as_raw_fd(), TUNSETIFF, &mut attach) };
        if result < 0 {
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(libc::EBUSY) => TunError::Busy(name.to_owned()),
                Some(libc::EINVAL) => TunError::NotTun(name.to_owned()),
                _ => call("TUNSETIFF")(source),
            });
        }
        if !existed {
            tun.set_mtu(DEFAULT_MTU).map_err(call("SIOCSIFMTU"))?;
        }
        Ok(tun)
    }

    /// Whether the device stays when nobody is attached to it, so that packets are dropped there and take no
    /// other road.
    pub fn set_persistent(&self, persistent: bool) -> io::Result<()> {
        let flag = libc::c_ulong::from(persistent);
        // SAFETY: the descriptor is open; TUNSETPERSIST takes an integer, not a pointer.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETPERSIST, flag) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Its MTU in bytes; an error once it is gone or moved to another namespace.
    pub fn mtu(&self) -> io::Result<usize> {
        let mut query = request(&self.name);
        // SAFETY: the socket is open and SIOCGIFMTU reads the name and writes the MTU of one ifreq.
        let result = unsafe { libc::ioctl(self.control.as_raw_fd(), libc::SIOCGIFMTU, &mut query) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: SIOCGIFMTU succeeded, so this member was written.
        let mtu = unsafe { query.ifr_ifru.ifru_mtu };
        usize::try_from(mtu).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
    }

    fn set_mtu(&self, mtu: usize) -> io::Result<()> {
        let mut change = request(&self.name);
        change.ifr_ifru.ifru_mtu = mtu as libc::c_int;
        // SAFETY: the socket is open and SIOCSIFMTU reads one ifreq.
        let result = unsafe { libc::ioctl(self.control.as_raw_fd(), libc::SIOCSIFMTU, &change) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Reads one packet.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Writes one packet.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(drop)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes integers only.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_patterns_or_paths_are_refused() {
        for bad in ["", ".", "..", "a/b", "tun%d", "a b", "a:1", "sixteen-bytes-xx", "ä"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        for good in ["wg0", "margay0", "fifteen-bytes-x", "a.b"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
    }
}
