//! The TUN device (Linux Documentation/networking/tuntap.rst).
#![allow(unsafe_code)] // ioctl(2) has no safe wrapper for TUN.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use mesh_uapi::{Offload, stats};

use crate::device::DEFAULT_MTU;
use crate::offload::coalesce::{Burst, Head, MAX_PACKETS};
use crate::offload::vnet_header::VnetHeader;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2_u32 as libc::Ioctl;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

/// What the kernel may hand over (linux/if_tun.h): checksums to complete, and large packets to cut.
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO: libc::c_uint = 0x02 | 0x04;
/// UDP; since Linux 6.2.
const TUN_F_USO: libc::c_uint = 0x20 | 0x40;

/// How many packets at once an attached device takes and gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Large {
    /// One; there is no header before it.
    No,
    /// TCP, up to 64 KiB.
    Tcp,
    /// UDP too.
    TcpAndUdp,
}

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

/// An attached TUN device: reads and writes IP packets, without blocking.
#[derive(Debug)]
pub struct Tun {
    name: String,
    file: File,
    large: Large,
    /// Whether large TCP and UDP packets come, and why not.
    offloads: [Offload; 2],
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
    /// Attaches to the TUN device `name`, which is made if there is none. With `offload` it tries to pass large
    /// packets; how a former owner had it does not matter.
    pub fn open(name: &str, offload: bool) -> Result<Self, TunError> {
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
        let offloads = [Offload::Off, Offload::Off];
        let mut tun = Self { name: name.to_owned(), file, large: Large::No, offloads, control };
        let refused = |e: &io::Error| e.raw_os_error() == Some(libc::EINVAL);
        let mut attached = tun.attach(offload);
        let header = offload && !attached.as_ref().is_err_and(refused);
        if offload && !header {
            tun.offloads = [Offload::Refused(libc::EINVAL), Offload::Refused(libc::EINVAL)];
            attached = tun.attach(false);
        }
        attached.map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => TunError::Busy(name.to_owned()),
            Some(libc::EINVAL) => TunError::NotTun(name.to_owned()),
            _ => call("TUNSETIFF")(source),
        })?;
        tun.large = if header { tun.negotiate().map_err(call("TUNSETVNETHDRSZ"))? } else { Large::No };
        if tun.large == Large::No {
            // The last owner's offloads stay with the device.
            tun.set_offload(0).map_err(call("TUNSETOFFLOAD"))?;
        }
        tracing::debug!("{name}: large packets: {:?}", tun.large);
        if !existed {
            tun.set_mtu(DEFAULT_MTU).map_err(call("SIOCSIFMTU"))?;
        }
        Ok(tun)
    }

    /// Goes on with a descriptor that another process attached.
    pub fn adopt(name: &str, attached: OwnedFd, offload: bool) -> Result<Self, TunError> {
        check_name(name)?;
        let call = |call| move |source| TunError::Call { name: name.to_owned(), call, source };
        let control = control_socket().map_err(call("socket"))?;
        let offloads = [Offload::Off, Offload::Off];
        let mut tun =
            Self { name: name.to_owned(), file: attached.into(), large: Large::No, offloads, control };
        let mut query = request(name);
        // SAFETY: the descriptor is open and TUNGETIFF writes one ifreq.
        let result = unsafe { libc::ioctl(tun.file.as_raw_fd(), TUNGETIFF, &mut query) };
        if result < 0 {
            return Err(call("TUNGETIFF")(io::Error::last_os_error()));
        }
        // SAFETY: TUNGETIFF succeeded, so this member was written.
        let flags = libc::c_int::from(unsafe { query.ifr_ifru.ifru_flags });
        if flags & libc::IFF_VNET_HDR != 0 {
            // The header stays with the descriptor; what is in it can be asked for anew.
            tun.large = tun.negotiate().map_err(call("TUNSETVNETHDRSZ"))?;
            if !offload {
                tun.set_offload(0).map_err(call("TUNSETOFFLOAD"))?;
                tun.offloads = [Offload::Off, Offload::Off];
            }
        }
        Ok(tun)
    }

    fn attach(&self, vnet_header: bool) -> io::Result<()> {
        let header = if vnet_header { libc::IFF_VNET_HDR } else { 0 };
        let mut attach = request(&self.name);
        attach.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | header) as libc::c_short;
        // SAFETY: the descriptor is open and TUNSETIFF reads and writes one ifreq.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETIFF, &mut attach) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Asks for as much as this kernel has.
    fn negotiate(&mut self) -> io::Result<Large> {
        let size = VnetHeader::SIZE as libc::c_int;
        // SAFETY: the descriptor is open; TUNSETVNETHDRSZ reads an int.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        self.offloads = [Offload::On, Offload::On];
        let refused = |e: &io::Error| Offload::Refused(e.raw_os_error().unwrap_or(libc::EIO));
        let Err(no_udp) = self.set_offload(TUN_F_CSUM | TUN_F_TSO | TUN_F_USO) else {
            return Ok(Large::TcpAndUdp);
        };
        self.offloads = [Offload::On, refused(&no_udp)];
        // Even a kernel that hands over small packets only takes large ones with that header.
        if let Err(no_tcp) = self.set_offload(TUN_F_CSUM | TUN_F_TSO) {
            self.offloads = [refused(&no_tcp), refused(&no_udp)];
            self.set_offload(0)?;
        }
        Ok(Large::Tcp)
    }

    fn set_offload(&self, offload: libc::c_uint) -> io::Result<()> {
        // SAFETY: the descriptor is open; TUNSETOFFLOAD takes an integer, not a pointer.
        let result =
            unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(offload)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// How many packets at once it passes.
    pub fn large(&self) -> Large {
        self.large
    }

    /// Whether the kernel hands over large TCP and UDP packets, by name.
    pub fn offloads(&self) -> impl Iterator<Item = (&'static str, &Offload)> {
        [stats::offload::TUN_TSO, stats::offload::TUN_USO].into_iter().zip(&self.offloads)
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

    /// Reads one packet, perhaps a large one; returns what it needs and where in the buffer it is.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<(VnetHeader, Range<usize>)> {
        let length = (&self.file).read(buffer)?;
        match buffer.first_chunk() {
            _ if self.large == Large::No => Ok((VnetHeader::default(), 0..length)),
            Some(header) if length >= VnetHeader::SIZE => {
                Ok((VnetHeader::from_bytes(header), VnetHeader::SIZE..length))
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Writes one packet.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        match self.large {
            Large::No => (&self.file).write(packet).map(drop),
            Large::Tcp | Large::TcpAndUdp => {
                let header = VnetHeader::default().to_bytes();
                (&self.file).write_vectored(&[IoSlice::new(&header), IoSlice::new(packet)]).map(drop)
            }
        }
    }

    /// Writes several packets as a large one.
    pub fn write_joined(&self, head: &Head, burst: &Burst<'_>) -> io::Result<()> {
        let vnet = head.vnet.to_bytes();
        let mut slices = [IoSlice::new(&[]); MAX_PACKETS + 2];
        let parts = [vnet.as_slice(), head.bytes()].into_iter().chain(burst.payloads());
        for (slice, part) in slices.iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        let used = slices.get(..burst.count() + 2).ok_or(io::ErrorKind::InvalidInput)?;
        (&self.file).write_vectored(used).map(drop)
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
