//! Packets, byte by byte.

use std::net::IpAddr;

/// What to build. Lengths and checksums are as the verdict needs them, that is: not at all.
#[derive(Debug, Clone)]
pub struct Spec {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub ports: (u16, u16),
    /// TCP flags, SCTP chunk type.
    pub flags: u8,
    /// ICMP type and code; the identifier is the source port.
    pub icmp: (u8, u8),
    /// Fragment: identification, offset in eight bytes, more to follow.
    pub fragment: Option<(u16, u16, bool)>,
    /// IPv6: hop-by-hop, destination options and routing headers before the transport.
    pub extensions: u8,
    pub hop_limit: u8,
    /// What an ICMP error quotes.
    pub payload: Vec<u8>,
}

impl Spec {
    pub fn new(source: IpAddr, destination: IpAddr, protocol: u8, ports: (u16, u16)) -> Self {
        Self {
            source,
            destination,
            protocol,
            ports,
            flags: 0,
            icmp: (8, 0),
            fragment: None,
            extensions: 0,
            hop_limit: 64,
            payload: vec![],
        }
    }

    /// With an Ethernet header.
    pub fn frame(&self) -> Vec<u8> {
        let mut frame = vec![0xee; 12];
        frame.extend(if self.source.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] });
        frame.extend(self.ip());
        frame
    }

    /// From the IP header on.
    pub fn ip(&self) -> Vec<u8> {
        let transport = self.transport();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let (id, offset, more) = self.fragment.unwrap_or_default();
                let mut packet = vec![0x45, 0];
                packet.extend((20 + transport.len() as u16).to_be_bytes());
                packet.extend(id.to_be_bytes());
                packet.extend((offset | u16::from(more) << 13).to_be_bytes());
                packet.extend([self.hop_limit, self.protocol, 0, 0]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
                packet.extend(transport);
                packet
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut chain: Vec<(u8, Vec<u8>)> =
                    [0, 60, 43].iter().take(self.extensions.into()).map(|kind| (*kind, vec![0; 8])).collect();
                if let Some((id, offset, more)) = self.fragment {
                    let mut header = vec![0, 0];
                    header.extend((offset << 3 | u16::from(more)).to_be_bytes());
                    header.extend(u32::from(id).to_be_bytes());
                    chain.push((44, header));
                }
                let next: Vec<u8> = chain.iter().map(|(kind, _)| *kind).chain([self.protocol]).collect();
                let mut rest = Vec::new();
                for (at, (_, header)) in chain.iter_mut().enumerate() {
                    header[0] = next[at + 1];
                    rest.extend_from_slice(header);
                }
                rest.extend(transport);
                let mut packet = vec![0x60, 0, 0, 0];
                packet.extend((rest.len() as u16).to_be_bytes());
                packet.extend([next[0], self.hop_limit]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
                packet.extend(rest);
                packet
            }
            _ => panic!("mixed families"),
        }
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.fragment.is_some_and(|(_, offset, _)| offset > 0) {
            return vec![0x5a; 24];
        }
        match self.protocol {
            1 | 58 => {
                bytes.extend([self.icmp.0, self.icmp.1, 0, 0]);
                bytes.extend(self.ports.0.to_be_bytes());
                bytes.extend([0, 0]);
            }
            _ => {
                bytes.extend(self.ports.0.to_be_bytes());
                bytes.extend(self.ports.1.to_be_bytes());
                match self.protocol {
                    6 => bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, self.flags, 0, 0, 0, 0, 0, 0]),
                    132 => bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, self.flags, 0, 0, 4]),
                    _ => bytes.extend([0, 8, 0, 0]),
                }
            }
        }
        bytes.extend(&self.payload);
        bytes
    }
}
