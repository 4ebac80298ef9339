//! Splitting and joining against the plainest oracle there is: packets built one by one, field by field, with
//! checksums summed two bytes at a time.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::checksum::Sum;
use super::coalesce::{Burst, MAX_PACKETS, coalesce};
use super::segment::{TCP, UDP};
use super::split::{SuperPacket, complete_checksum};
use super::vnet_header::{Gso, VnetHeader};

/// RFC 1071, section 1, without any of its tricks.
fn slow_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) * 256 + u32::from(*pair.get(1).unwrap_or(&0));
        if sum > 0xffff {
            sum -= 0xffff;
        }
    }
    !(sum as u16)
}

/// A packet as its sender means it.
#[derive(Debug, Clone)]
struct Plain {
    ipv6: bool,
    protocol: u8,
    flow: u8,
    class: u8,
    ttl: u8,
    id: u16,
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
    window: u16,
    /// Words of TCP options.
    options: Vec<u32>,
    payload: Vec<u8>,
}

impl Plain {
    fn new(ipv6: bool, protocol: u8) -> Self {
        Self {
            ipv6,
            protocol,
            flow: 1,
            class: 0,
            ttl: 64,
            id: 0xfffe,
            sequence: u32::MAX - 1500,
            acknowledgement: 7,
            flags: 0x10,
            window: 500,
            options: vec![0x0101_080a, 1, 2],
            payload: vec![1; 100],
        }
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = vec![0x13, self.flow, 0x00, 0x50];
        if self.protocol == UDP {
            bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            bytes.extend([0, 0]);
        } else {
            bytes.extend(self.sequence.to_be_bytes());
            bytes.extend(self.acknowledgement.to_be_bytes());
            bytes.extend([((5 + self.options.len()) << 4) as u8, self.flags]);
            bytes.extend(self.window.to_be_bytes());
            bytes.extend([0, 0, 0, 0]);
            bytes.extend(self.options.iter().flat_map(|word| word.to_be_bytes()));
        }
        bytes
    }

    fn headers(&self) -> usize {
        let ip = if self.ipv6 { 40 } else { 20 };
        ip + self.transport().len()
    }

    fn addresses(&self) -> Vec<u8> {
        let size = if self.ipv6 { 16 } else { 4 };
        let address = |last: u8| (0..size).map(move |n| if n + 1 == size { last } else { 10 });
        address(1).chain(address(2)).collect()
    }

    fn pseudo_header(&self, length: usize) -> Vec<u8> {
        let mut bytes = self.addresses();
        bytes.extend((length as u32).to_be_bytes());
        bytes.extend([0, 0, 0, self.protocol]);
        bytes
    }

    /// With all its checksums; or, as the kernel hands it over, with the sum of the pseudo-header only.
    fn bytes(&self, partial: bool) -> Vec<u8> {
        let mut transport = self.transport();
        let at = if self.protocol == UDP { 6 } else { 16 };
        transport.extend(&self.payload);
        let mut summed = self.pseudo_header(transport.len());
        if !partial {
            summed.extend(&transport);
        }
        let checksum = match slow_checksum(&summed) {
            sum if partial => !sum,
            0 if self.protocol == UDP => 0xffff,
            sum => sum,
        };
        transport[at..at + 2].copy_from_slice(&checksum.to_be_bytes());

        let mut packet = Vec::new();
        if self.ipv6 {
            packet.extend([0x60 | self.class >> 4, self.class << 4, 0xab, 0xcd]);
            packet.extend((transport.len() as u16).to_be_bytes());
            packet.extend([self.protocol, self.ttl]);
            packet.extend(self.addresses());
        } else {
            packet.extend([0x45, self.class]);
            packet.extend((20 + transport.len() as u16).to_be_bytes());
            packet.extend(self.id.to_be_bytes());
            packet.extend([0x40, 0, self.ttl, self.protocol, 0, 0]);
            packet.extend(self.addresses());
            let checksum = slow_checksum(&packet);
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        packet.extend(transport);
        packet
    }

    fn gso(&self) -> Gso {
        match (self.protocol, self.ipv6) {
            (UDP, _) => Gso::Udp,
            (_, false) => Gso::Tcp4,
            (_, true) => Gso::Tcp6,
        }
    }

    fn vnet(&self, segment: usize) -> VnetHeader {
        VnetHeader {
            header_length: self.headers() as u16,
            gso_size: segment as u16,
            checksum_start: if self.ipv6 { 40 } else { 20 },
            checksum_offset: if self.protocol == UDP { 6 } else { 16 },
            ..VnetHeader::segmented(self.gso())
        }
    }

    /// What its sender would have sent without any offload.
    fn pieces(&self, segment: usize) -> Vec<Plain> {
        let count = self.payload.len().div_ceil(segment);
        let piece = |(n, payload): (usize, &[u8])| {
            let mut flags = self.flags;
            if n > 0 {
                flags &= !0x80;
            }
            if n + 1 < count {
                flags &= !0x09;
            }
            Plain {
                id: self.id.wrapping_add(n as u16),
                sequence: self.sequence.wrapping_add((n * segment) as u32),
                payload: payload.to_vec(),
                flags,
                ..self.clone()
            }
        };
        self.payload.chunks(segment).enumerate().map(piece).collect()
    }
}

fn split(header: &VnetHeader, packet: &[u8]) -> Vec<Vec<u8>> {
    let large = SuperPacket::parse(header, packet).unwrap();
    let mut out = vec![0; 65_536];
    let piece = |n| {
        let length = large.write(n, &mut out).unwrap();
        out[..length].to_vec()
    };
    (0..large.count()).map(piece).collect()
}

/// What the kernel makes of a write.
fn received(burst: &Burst<'_>) -> Vec<Vec<u8>> {
    let Some(head) = burst.head() else { return burst.packets().map(<[u8]>::to_vec).collect() };
    let mut packet = head.bytes().to_vec();
    burst.payloads().for_each(|payload| packet.extend(payload));
    assert!(packet.len() <= 65_535 && burst.count() <= MAX_PACKETS);
    let at = usize::from(head.vnet.checksum_start);
    assert!(head.vnet.needs_checksum() && usize::from(head.vnet.header_length) == head.bytes().len());
    if packet[0] == 0x45 {
        assert_eq!(slow_checksum(&packet[..at]), 0, "IPv4 header of the joined packet");
    }
    // The partial checksum is the pseudo-header's: completed, the large packet is right as a whole.
    let mut whole = packet.clone();
    complete_checksum(&head.vnet, &mut whole).unwrap();
    let protocol = if head.vnet.gso() == Some(Gso::Udp) { UDP } else { TCP };
    let mut summed = whole[if at == 20 { 12 } else { 8 }..at].to_vec();
    summed.extend(((whole.len() - at) as u32).to_be_bytes());
    summed.extend([0, 0, 0, protocol]);
    summed.extend(&whole[at..]);
    assert_eq!(slow_checksum(&summed), 0, "checksum of the joined packet");
    split(&head.vnet, &packet)
}

fn family() -> impl Strategy<Value = (bool, u8)> {
    (any::<bool>(), prop_oneof![Just(TCP), Just(UDP)])
}

/// What may happen to a stream between two of its packets.
#[derive(Debug, Clone, Copy)]
enum Step {
    Next,
    Short,
    Pushed,
    Empty,
    Lost,
    Repeated,
    OtherAck,
    OtherWindow,
    OtherOptions,
    OtherTtl,
    OtherClass,
    Fin,
    BadByte(u8),
    Garbage(u8),
    Icmp,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        40 => Just(Step::Next),
        2 => Just(Step::Short),
        2 => Just(Step::Pushed),
        1 => Just(Step::Empty),
        1 => Just(Step::Lost),
        1 => Just(Step::Repeated),
        1 => Just(Step::OtherAck),
        1 => Just(Step::OtherWindow),
        1 => Just(Step::OtherOptions),
        1 => Just(Step::OtherTtl),
        1 => Just(Step::OtherClass),
        1 => Just(Step::Fin),
        2 => any::<u8>().prop_map(Step::BadByte),
        1 => any::<u8>().prop_map(Step::Garbage),
        1 => Just(Step::Icmp),
    ]
}

/// Streams that are mixed and mistreated as `steps` say: each packet with the number of its flow, if it has one.
fn streams(kinds: &[(bool, u8)], size: usize, steps: &[(usize, Step)]) -> Vec<(Option<usize>, Vec<u8>)> {
    let mut flows: Vec<Plain> = kinds
        .iter()
        .zip(1..)
        .map(|((ipv6, protocol), flow)| Plain { flow, ..Plain::new(*ipv6, *protocol) })
        .collect();
    let mut packets = Vec::new();
    for (n, (flow, step)) in steps.iter().enumerate() {
        let number = flow % flows.len();
        let state = &mut flows[number];
        let mut bad = None;
        let mut flags = 0x10;
        let mut length = size;
        match *step {
            Step::Next => {}
            Step::Short => length = size / 2,
            Step::Pushed => flags = 0x18,
            Step::Empty => length = 0,
            Step::Lost => state.sequence = state.sequence.wrapping_add(size as u32),
            Step::Repeated => state.sequence = state.sequence.wrapping_sub(size as u32),
            Step::OtherAck => state.acknowledgement += 1,
            Step::OtherWindow => state.window += 1,
            Step::OtherOptions => state.options[2] += 1,
            Step::OtherTtl => state.ttl -= 1,
            Step::OtherClass => state.class ^= 4,
            Step::Fin => flags = 0x11,
            Step::BadByte(at) => bad = Some(usize::from(at)),
            Step::Garbage(length) => {
                packets.push((None, vec![n as u8; usize::from(length)]));
                continue;
            }
            Step::Icmp => {
                packets.push((None, Plain { flow: 0, ..Plain::new(false, 1) }.bytes(false)));
                continue;
            }
        }
        let payload = (0..length).map(|at| (at * 7 + n) as u8).collect();
        let packet = Plain { flags, payload, ..state.clone() };
        state.id = state.id.wrapping_add(1);
        state.sequence = state.sequence.wrapping_add(length as u32);
        let mut bytes = packet.bytes(false);
        if let Some(at) = bad {
            // Addresses and ports stay, for another flow's packet may go before this flow's.
            let kept = if packet.ipv6 { 8..44 } else { 12..24 };
            let at = Some(at % bytes.len()).filter(|at| !kept.contains(at)).unwrap_or(bytes.len() - 1);
            bytes[at] ^= 0x20;
        }
        // A wrong byte may make it nobody's.
        packets.push((bad.is_none().then_some(number), bytes));
    }
    packets
}

proptest! {
    #[test]
    fn checksums_are_those_of_the_plain_sum(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0xff), Just(0)], 0..3000),
        even in 0usize..1500,
    ) {
        let (a, b) = bytes.split_at((even * 2).min(bytes.len() / 2 * 2));
        let sum = Sum::default().with(a).with(b);
        prop_assert_eq!(u16::from_be_bytes(sum.finish()), slow_checksum(&bytes));
        prop_assert_eq!(u16::from_be_bytes(sum.partial()), !slow_checksum(&bytes));
    }

    #[test]
    fn a_large_packet_splits_into_what_would_have_been_sent_without_it(
        (ipv6, protocol) in family(),
        segment in 1usize..9000,
        count in 1usize..70,
        missing in 0usize..9000,
        flags in any::<u8>(),
    ) {
        let size = (segment * count).min(65_000).saturating_sub(missing % segment).max(1);
        let payload = (0..size).map(|n| (n / 3) as u8).collect();
        let large = Plain { payload, flags, ..Plain::new(ipv6, protocol) };
        let pieces: Vec<_> = large.pieces(segment).iter().map(|piece| piece.bytes(false)).collect();
        prop_assert_eq!(split(&large.vnet(segment), &large.bytes(true)), pieces);
    }

    #[test]
    fn a_packet_with_a_partial_checksum_is_completed((ipv6, protocol) in family(), size in 0usize..2000) {
        let plain = Plain { payload: vec![9; size], ..Plain::new(ipv6, protocol) };
        let mut packet = plain.bytes(true);
        // `needs_checksum` and no more.
        let header = VnetHeader { gso_type: 0, ..plain.vnet(0) };
        complete_checksum(&header, &mut packet).unwrap();
        prop_assert_eq!(packet, plain.bytes(false));
    }

    #[test]
    fn what_is_joined_splits_into_the_same_packets_with_each_flow_in_order(
        kinds in prop::collection::vec(family(), 1..5),
        size in prop_oneof![Just(1usize), 2usize..1400, Just(9000)],
        steps in prop::collection::vec((0usize..5, step()), 0..200),
        udp in any::<bool>(),
    ) {
        let packets = streams(&kinds, size, &steps);
        let bursts = coalesce(packets.iter().map(|(_, packet)| packet.as_slice()), udp);
        let as_given: Vec<_> = bursts.iter().flat_map(|b| b.packets().map(<[u8]>::to_vec)).collect();
        let after: Vec<_> = bursts.iter().flat_map(received).collect();
        prop_assert_eq!(&after, &as_given);
        if kinds.len() == 1 {
            let before: Vec<_> = packets.into_iter().map(|(_, packet)| packet).collect();
            prop_assert_eq!(after, before);
            return Ok(());
        }
        // Each packet once, and those of a flow in the order they had.
        let mut sorted = [after.clone(), packets.iter().map(|(_, p)| p.clone()).collect()];
        sorted.iter_mut().for_each(|list| list.sort());
        prop_assert_eq!(&sorted[0], &sorted[1]);
        for flow in 0..kinds.len() {
            let of_flow: Vec<_> = packets.iter().filter(|(f, _)| *f == Some(flow)).map(|(_, p)| p).collect();
            let arrived: Vec<_> = after.iter().filter(|p| of_flow.contains(p)).collect();
            // Equal packets, such as repeated ones, are in both lists as often.
            prop_assert_eq!(arrived, of_flow);
        }
    }

    #[test]
    fn any_bytes_under_any_header_are_cut_or_refused(
        flags in any::<[u8; 2]>(),
        numbers in any::<[u16; 4]>(),
        small in prop::collection::vec(0u16..80, 4),
        version in prop_oneof![Just(0x45u8), Just(0x60), Just(0x4f), any::<u8>()],
        mut packet in prop::collection::vec(any::<u8>(), 0..300),
        choose_small in any::<bool>(),
    ) {
        let pick = |n: usize| if choose_small { small[n] } else { numbers[n] };
        let header = VnetHeader {
            flags: flags[0],
            gso_type: if choose_small { [0, 1, 4, 5, 0x81][usize::from(flags[1]) % 5] } else { flags[1] },
            header_length: pick(0),
            gso_size: pick(1),
            checksum_start: pick(2),
            checksum_offset: pick(3),
        };
        if let Some(first) = packet.first_mut() {
            *first = version;
        }
        let length = packet.len();
        let _ = complete_checksum(&header, &mut packet);
        prop_assert_eq!(packet.len(), length);
        if let Some(large) = SuperPacket::parse(&header, &packet) {
            let mut out = vec![0; 65_536];
            for n in 0..large.count() {
                prop_assert!(large.write(n, &mut out).is_some_and(|length| length <= packet.len()));
            }
            prop_assert!(large.write(large.count() + 1, &mut out).is_none());
        }
        prop_assert_eq!(VnetHeader::from_bytes(&header.to_bytes()), header);
    }
}

#[test]
fn equal_neighbours_become_one_write_and_the_short_or_pushed_one_is_the_last() {
    for (ipv6, protocol) in [(false, TCP), (true, TCP), (false, UDP), (true, UDP)] {
        let large = Plain { payload: vec![5; 40 * 1000 + 1], flags: 0x18, ..Plain::new(ipv6, protocol) };
        let mut packets: Vec<_> = large.pieces(1000).iter().map(|piece| piece.bytes(false)).collect();
        packets.extend(packets.clone());
        let bursts = coalesce(packets.iter().map(Vec::as_slice), true);
        let counts: Vec<_> = bursts.iter().map(Burst::count).collect();
        assert_eq!(counts, [41, 41]);
        let alone = coalesce(packets.iter().map(Vec::as_slice), false);
        assert_eq!(alone.len(), if protocol == UDP { 82 } else { 2 });
    }
}

#[test]
fn a_write_holds_64_packets_and_65535_bytes_at_most() {
    for (size, expected) in [(10, [64, 64]), (1380, [47, 47])] {
        let packets: Vec<_> = (0..150u16)
            .map(|n| Plain {
                id: n,
                sequence: u32::from(n) * size,
                payload: vec![1; size as usize],
                ..Plain::new(false, TCP)
            })
            .map(|plain| plain.bytes(false))
            .collect();
        let bursts = coalesce(packets.iter().map(Vec::as_slice), true);
        let counts: Vec<_> = bursts.iter().map(Burst::count).take(2).collect();
        assert_eq!(counts, expected);
        assert_eq!(bursts.iter().map(Burst::count).sum::<usize>(), 150);
    }
}

#[test]
fn a_wrong_checksum_is_passed_on_as_it_is() {
    for (ipv6, protocol) in [(false, TCP), (true, TCP), (false, UDP), (true, UDP)] {
        let large = Plain { payload: vec![5; 3000], ..Plain::new(ipv6, protocol) };
        let mut packets: Vec<_> = large.pieces(1000).iter().map(|piece| piece.bytes(false)).collect();
        *packets[1].last_mut().unwrap() ^= 1;
        let bursts = coalesce(packets.iter().map(Vec::as_slice), true);
        assert_eq!(bursts.len(), 3);
        assert!(bursts.iter().flat_map(Burst::packets).eq(packets.iter().map(Vec::as_slice)));
    }
}
