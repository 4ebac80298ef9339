//! Joins consecutive packets of a flow into one that the kernel takes as a whole, and whose pieces, should it
//! cut them again, are the same to the byte.

use super::checksum::Sum;
use super::segment::{PSH, Segment, TCP};
use super::vnet_header::{Gso, VnetHeader};

/// Most packets in one write: the kernel refuses more datagrams (UDP_MAX_SEGMENTS).
pub const MAX_PACKETS: usize = 64;
/// Flows followed at a time.
const MAX_OPEN: usize = 16;
/// Longest headers: IPv6, and TCP with all options.
const MAX_HEAD: usize = 40 + 60;

/// One write: a packet, or several of one flow.
#[derive(Debug)]
pub struct Burst<'a> {
    first: &'a [u8],
    /// The first one again, if others may follow it.
    lead: Option<Segment<'a>>,
    more: Vec<Segment<'a>>,
}

/// The headers of a joined packet.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    /// How the kernel is to cut it.
    pub vnet: VnetHeader,
    bytes: [u8; MAX_HEAD],
    length: usize,
}

impl Head {
    /// IP and transport header.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

impl<'a> Burst<'a> {
    /// The packets as they came.
    pub fn packets(&self) -> impl Iterator<Item = &'a [u8]> {
        std::iter::once(self.first).chain(self.more.iter().map(|segment| segment.packet))
    }

    /// What they carry, behind the [`Burst::head`].
    pub fn payloads(&self) -> impl Iterator<Item = &'a [u8]> {
        self.lead.iter().chain(&self.more).map(|segment| segment.payload)
    }

    /// How many packets it is.
    pub fn count(&self) -> usize {
        1 + self.more.len()
    }

    /// The headers of the joined packet; `None` for a single one.
    pub fn head(&self) -> Option<Head> {
        let (first, last) = (self.lead.as_ref()?, self.more.last()?);
        let length = first.ip.len() + first.transport.len();
        let total = length + self.payloads().map(<[u8]>::len).sum::<usize>();
        let mut bytes = [0; MAX_HEAD];
        bytes.get_mut(..length)?.copy_from_slice(first.packet.get(..length)?);
        let (ip, transport) = bytes.get_mut(..length)?.split_at_mut_checked(first.ip.len())?;

        let transport_length = u16::try_from(total - ip.len()).ok()?;
        let gso = match (first.protocol == TCP, first.is_ipv6()) {
            (true, false) => Gso::Tcp4,
            (true, true) => Gso::Tcp6,
            (false, _) => Gso::Udp,
        };
        if first.is_ipv6() {
            ip.get_mut(4..6)?.copy_from_slice(&transport_length.to_be_bytes());
        } else {
            ip.get_mut(2..4)?.copy_from_slice(&u16::try_from(total).ok()?.to_be_bytes());
            ip.get_mut(10..12)?.fill(0);
            let checksum = Sum::default().with(ip).finish();
            ip.get_mut(10..12)?.copy_from_slice(&checksum);
        }
        if first.protocol != TCP {
            transport.get_mut(4..6)?.copy_from_slice(&transport_length.to_be_bytes());
        } else if last.is_pushed() {
            *transport.get_mut(13)? |= PSH;
        }
        let at = first.checksum_offset();
        let pseudo = Sum::default().with_pseudo_header(first.addresses(), first.protocol, transport_length);
        transport.get_mut(at..at + 2)?.copy_from_slice(&pseudo.partial());

        let vnet = VnetHeader {
            header_length: length as u16,
            gso_size: first.payload.len() as u16,
            checksum_start: first.ip.len() as u16,
            checksum_offset: at as u16,
            ..VnetHeader::segmented(gso)
        };
        Some(Head { vnet, bytes, length })
    }

    /// Takes the next packet if it can; returns whether the burst can go on then.
    fn join(&mut self, segment: &Segment<'a>) -> Option<bool> {
        let first = self.lead.as_ref()?;
        if !segment.continues(first, self.count()) {
            return None;
        }
        let full = segment.payload.len() == first.payload.len() && self.count() + 1 < MAX_PACKETS;
        self.more.push(*segment);
        Some(full && !segment.is_pushed())
    }
}

/// Joins what can be joined. The packets of a flow keep their order; a packet that is of no flow we can see keeps
/// its place among all others.
pub fn coalesce<'a>(packets: impl Iterator<Item = &'a [u8]>, udp: bool) -> Vec<Burst<'a>> {
    let mut bursts: Vec<Burst<'a>> = Vec::new();
    // Those that can go on, at most one a flow.
    let mut open: Vec<usize> = Vec::new();
    for packet in packets {
        let segment = Segment::parse(packet);
        let Some(segment) = segment else {
            open.clear();
            bursts.push(Burst { first: packet, lead: None, more: Vec::new() });
            continue;
        };
        let joinable = (udp || segment.protocol == TCP) && segment.is_joinable();
        let of_flow = |at: &usize| {
            let lead = bursts.get(*at).and_then(|burst| burst.lead.as_ref());
            lead.is_some_and(|lead| lead.same_flow(&segment))
        };
        if let Some(place) = open.iter().position(of_flow) {
            let at = open.remove(place);
            let joined = bursts.get_mut(at).filter(|_| joinable).and_then(|burst| burst.join(&segment));
            if joined == Some(true) {
                open.push(at);
            }
            if joined.is_some() {
                continue;
            }
        }
        if joinable && !segment.is_pushed() {
            if open.len() == MAX_OPEN {
                open.remove(0);
            }
            open.push(bursts.len());
        }
        bursts.push(Burst { first: packet, lead: joinable.then_some(segment), more: Vec::new() });
    }
    bursts
}
