//! A generic netlink socket (Documentation/userspace-api/netlink/intro.rst) that leaves no key behind: what it sends and
//! receives is in one buffer each, wiped after use. netlink-proto, which everything else uses, keeps copies and can log them.

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
    NetlinkBuffer, NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily as _, GenlMessage};
use netlink_packet_wireguard::{WireguardAttribute, WireguardCmd, WireguardMessage};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket as RawSocket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use zeroize::{Zeroize as _, Zeroizing};

use super::set::wipe;

/// Bytes of a datagram from the kernel; its dumps take at most half of it.
const BUFFER: usize = 1 << 16;
/// The kernel answers at once.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of the generic header before a message's attributes.
const GENERIC_HEADER: usize = 4;
/// CTRL_ATTR_FAMILY_ID (include/uapi/linux/genetlink.h).
const FAMILY_ID: u16 = 1;

/// A socket that knows the family `wireguard`.
pub(super) struct Socket {
    socket: RawSocket,
    family: u16,
    sequence: u32,
    buffer: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("family", &self.family).finish_non_exhaustive()
    }
}

impl Socket {
    /// In this thread's network namespace. ENOENT: the kernel has no WireGuard.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = RawSocket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let patience = TimeVal::new(PATIENCE.as_secs() as i64, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
        let mut socket = Self { socket, family: 0, sequence: 0, buffer: Zeroizing::new(vec![0; BUFFER]) };
        socket.family = socket.resolve()?;
        Ok(socket)
    }

    fn resolve(&mut self) -> io::Result<u16> {
        let name = WireguardMessage::family_name().to_owned();
        let request = GenlMessage::from_payload(GenlCtrl {
            cmd: GenlCtrlCmd::GetFamily,
            nlas: vec![GenlCtrlAttrs::FamilyName(name)],
        });
        let mut family = None;
        self.send(&mut request.into(), NLM_F_REQUEST | NLM_F_ACK)?;
        self.receive(|part| {
            let attributes = NlasIterator::new(part);
            for attribute in attributes.flatten().filter(|attribute| attribute.kind() == FAMILY_ID) {
                family = attribute.value().first_chunk().map(|bytes| u16::from_ne_bytes(*bytes));
            }
            Ok(())
        })?;
        family.ok_or_else(|| malformed("the kernel did not tell the family's number"))
    }

    /// WG_CMD_GET_DEVICE. `part` gets the attributes of each message. `Interrupted`: the device changed meanwhile, and what
    /// was told does not fit together.
    pub(super) fn dump(
        &mut self,
        name: &str,
        part: impl FnMut(&[u8]) -> Result<(), DecodeError>,
    ) -> io::Result<()> {
        let attributes = vec![WireguardAttribute::IfName(name.to_owned())];
        self.request(WireguardCmd::GetDevice, attributes, NLM_F_REQUEST | NLM_F_DUMP)?;
        self.receive(part)
    }

    /// WG_CMD_SET_DEVICE. The first of the attributes is the device's name.
    pub(super) fn set(&mut self, attributes: Vec<WireguardAttribute>) -> io::Result<()> {
        self.request(WireguardCmd::SetDevice, attributes, NLM_F_REQUEST | NLM_F_ACK)?;
        self.receive(|_| Ok(()))
    }

    fn request(
        &mut self,
        cmd: WireguardCmd,
        attributes: Vec<WireguardAttribute>,
        flags: u16,
    ) -> io::Result<()> {
        let mut message = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
        message.set_resolved_family_id(self.family);
        let mut message = NetlinkMessage::from(message);
        let sent = self.send(&mut message, flags);
        if let NetlinkPayload::InnerMessage(message) = &mut message.payload {
            wipe(&mut message.payload.attributes);
        }
        sent
    }

    fn send<M: NetlinkSerializable>(
        &mut self,
        message: &mut NetlinkMessage<M>,
        flags: u16,
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut text = Zeroizing::new(vec![0; message.buffer_len()]);
        message.serialize(&mut text);
        self.socket.send(&text, 0).map(drop)
    }

    /// Reads to the end of the answer: an acknowledgement, an error, or the end of a dump.
    fn receive(&mut self, mut part: impl FnMut(&[u8]) -> Result<(), DecodeError>) -> io::Result<()> {
        let mut interrupted = false;
        let mut problem = None;
        loop {
            let mut space = self.buffer.as_mut_slice();
            let length = self.socket.recv(&mut space, 0)?;
            let mut rest = self.buffer.get(..length).unwrap_or_default();
            let mut end = None;
            while end.is_none() && !rest.is_empty() {
                let message =
                    NetlinkBuffer::new_checked(rest).map_err(|error| malformed(&error.to_string()))?;
                // Of a request that was given up.
                if message.sequence_number() == self.sequence {
                    interrupted |= message.flags() & NLM_F_DUMP_INTR != 0;
                    match message.message_type() {
                        NLMSG_ERROR | NLMSG_DONE => end = Some(status(message.payload())),
                        _ => {
                            let attributes = message.payload().get(GENERIC_HEADER..).unwrap_or_default();
                            // The rest has to be read all the same.
                            if let Err(error) = part(attributes) {
                                problem = Some(malformed(&error.to_string()));
                            }
                        }
                    }
                }
                let step = (message.length() as usize).next_multiple_of(4);
                rest = rest.get(step..).unwrap_or_default();
            }
            if let Some(used) = self.buffer.get_mut(..length) {
                used.zeroize();
            }
            match end {
                None => {}
                Some(Ok(())) if interrupted => return Err(io::ErrorKind::Interrupted.into()),
                Some(outcome) => return problem.map_or(outcome, Err),
            }
        }
    }
}

/// The errno that errors, acknowledgements and ends of dumps begin with, negated; 0 for none.
fn status(payload: &[u8]) -> io::Result<()> {
    match payload.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes)) {
        None | Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
    }
}

fn malformed(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("netlink: {why}"))
}
