//! Several messages in one system call: recvmmsg(2) and sendmmsg(2), each of which may hold several datagrams
//! (udp(7): UDP_GRO, UDP_SEGMENT).
#![allow(unsafe_code)] // Raw message headers: nix's allocate for every call.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd as _;

use crate::batch::Run;

/// Messages received at once.
pub const RECEIVED: usize = 8;
/// Messages sent at once.
pub const SENT: usize = 16;
/// Bytes of one message at most.
pub const MESSAGE: usize = 65_536;

/// Room for one control message of an int, aligned as cmsg(3) wants it.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 64]);

/// One message: who sent it, how many bytes, and how long each datagram in it is but perhaps the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// The sender.
    pub from: SocketAddr,
    /// Bytes of all its datagrams.
    pub length: usize,
    /// Bytes of each.
    pub segment: usize,
}

/// Receives up to [`RECEIVED`] messages, the nth into the nth [`MESSAGE`] bytes of `buffer`; without waiting. Those
/// of no Internet address are `None`.
pub fn receive(
    socket: &UdpSocket,
    buffer: &mut [u8],
    messages: &mut [Option<Message>; RECEIVED],
) -> io::Result<usize> {
    // SAFETY: all of these are plain data, for which all zeros are a value.
    let (mut headers, mut vectors, mut names) = unsafe {
        (
            zeroed::<[libc::mmsghdr; RECEIVED]>(),
            zeroed::<[libc::iovec; RECEIVED]>(),
            zeroed::<[libc::sockaddr_storage; RECEIVED]>(),
        )
    };
    let mut controls = [Control([0; 64]); RECEIVED];
    let mut count = 0;
    let places = headers.iter_mut().zip(&mut vectors).zip(names.iter_mut().zip(&mut controls));
    for (((header, vector), (name, control)), room) in places.zip(buffer.chunks_exact_mut(MESSAGE)) {
        vector.iov_base = room.as_mut_ptr().cast();
        vector.iov_len = room.len();
        header.msg_hdr.msg_iov = vector;
        header.msg_hdr.msg_iovlen = 1;
        header.msg_hdr.msg_name = (&raw mut *name).cast();
        header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
        header.msg_hdr.msg_controllen = control.0.len() as _;
        count += 1;
    }
    // SAFETY: the first `count` headers point to buffers, names and controls that live until the call is over.
    let received = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            count,
            libc::MSG_DONTWAIT as _,
            std::ptr::null_mut(),
        )
    };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    for ((message, header), name) in messages.iter_mut().zip(&headers).zip(&names).take(received) {
        let length = header.msg_len as usize;
        let segment = segment_of(&header.msg_hdr).filter(|size| *size > 0).unwrap_or(length);
        *message = address_of(name).map(|from| Message { from, length, segment });
    }
    Ok(received)
}

/// The size that UDP_GRO tells.
fn segment_of(header: &libc::msghdr) -> Option<usize> {
    // SAFETY: the kernel filled the control buffer, which is alive, and its length; the macros stay within it.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = control.as_ref() {
            if message.cmsg_level == libc::SOL_UDP && message.cmsg_type == libc::UDP_GRO {
                let size = libc::CMSG_DATA(control).cast::<libc::c_int>().read_unaligned();
                return usize::try_from(size).ok();
            }
            control = libc::CMSG_NXTHDR(header, control);
        }
    }
    None
}

fn address_of(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let storage: *const libc::sockaddr_storage = name;
    match libc::c_int::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: sockaddr_storage is large and aligned enough for every address; the family says which it is.
            let v4 = unsafe { &*storage.cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { &*storage.cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), v6.sin6_flowinfo, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// Sends up to [`SENT`] runs, each at once; returns how many were. An error is about the first one.
pub fn send(socket: &UdpSocket, runs: &[Run<'_, SocketAddr>]) -> io::Result<usize> {
    // SAFETY: all of these are plain data, for which all zeros are a value.
    let (mut headers, mut vectors) =
        unsafe { (zeroed::<[libc::mmsghdr; SENT]>(), zeroed::<[libc::iovec; SENT]>()) };
    let mut names: [Option<socket2::SockAddr>; SENT] = [const { None }; SENT];
    let mut controls = [Control([0; 64]); SENT];
    let mut count = 0;
    let places = headers.iter_mut().zip(&mut vectors).zip(names.iter_mut().zip(&mut controls));
    for (((header, vector), (name, control)), run) in places.zip(runs) {
        let name = name.insert((*run.to).into());
        vector.iov_base = run.bytes.as_ptr().cast_mut().cast();
        vector.iov_len = run.bytes.len();
        header.msg_hdr.msg_iov = vector;
        header.msg_hdr.msg_iovlen = 1;
        header.msg_hdr.msg_name = name.as_ptr().cast_mut().cast();
        header.msg_hdr.msg_namelen = name.len();
        if run.bytes.len() > run.segment {
            let segment =
                u16::try_from(run.segment).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
            header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: CMSG_SPACE and CMSG_LEN only compute; the buffer has room for one message of two bytes and
            // is aligned for it.
            unsafe {
                header.msg_hdr.msg_controllen = libc::CMSG_SPACE(size_of::<u16>() as _) as _;
                let message = &mut *control.0.as_mut_ptr().cast::<libc::cmsghdr>();
                message.cmsg_level = libc::SOL_UDP;
                message.cmsg_type = libc::UDP_SEGMENT;
                message.cmsg_len = libc::CMSG_LEN(size_of::<u16>() as _) as _;
                libc::CMSG_DATA(message).cast::<u16>().write_unaligned(segment);
            }
        }
        count += 1;
    }
    // SAFETY: the first `count` headers point to data, names and controls that live until the call is over; the
    // kernel only reads the data.
    let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count, 0) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
