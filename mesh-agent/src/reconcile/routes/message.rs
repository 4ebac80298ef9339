//! Routes to and from rtnetlink messages.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use mesh_api::defaults::ROUTE_PROTOCOL;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};

use super::same_family;
use crate::desired::{Route, RouteTarget};

const PROTOCOL: RouteProtocol = RouteProtocol::Other(ROUTE_PROTOCOL);

/// Dump requests that the kernel answers with our routes in `table` only, one for each family.
pub(super) fn filters(table: u32) -> [RouteMessage; 2] {
    [AddressFamily::Inet, AddressFamily::Inet6].map(|family| {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.header.protocol = PROTOCOL;
        message.attributes.push(RouteAttribute::Table(table));
        message
    })
}

/// A route as a dump shows it.
pub(super) enum Parsed {
    /// Ours, as desired ones are.
    Ours(Route),
    /// Ours by protocol number, of a form we never make; cut down to what identifies it.
    Odd(RouteMessage),
    /// Not ours.
    Foreign,
}

/// Reads one message of a dump.
pub(super) fn parse(message: &RouteMessage, links: &BTreeMap<u32, &str>) -> Parsed {
    if message.header.protocol != PROTOCOL {
        return Parsed::Foreign;
    }
    match parse_ours(message, links) {
        Some(route) => Parsed::Ours(route),
        None => {
            let mut odd = message.clone();
            odd.attributes.retain(identifies);
            Parsed::Odd(for_removal(odd))
        }
    }
}

fn identifies(attribute: &RouteAttribute) -> bool {
    use RouteAttribute as A;
    matches!(
        attribute,
        A::Table(_)
            | A::Destination(_)
            | A::Priority(_)
            | A::Oif(_)
            | A::Gateway(_)
            | A::Via(_)
            | A::MultiPath(_)
            | A::EncapType(_)
            | A::Encap(_)
            | A::NhId(_)
    )
}

fn parse_ours(message: &RouteMessage, links: &BTreeMap<u32, &str>) -> Option<Route> {
    let mut table = u32::from(message.header.table);
    let (mut ip, mut src, mut oif, mut metric) = (None, None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Destination(value) => ip = Some(address(value)?),
            RouteAttribute::PrefSource(value) => src = Some(address(value)?),
            RouteAttribute::Oif(value) => oif = Some(*value),
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::Gateway(_)
            | RouteAttribute::Via(_)
            | RouteAttribute::MultiPath(_)
            | RouteAttribute::Encap(_)
            | RouteAttribute::NhId(_)
            | RouteAttribute::Metrics(_) => return None,
            _ => {}
        }
    }
    let ip = ip.unwrap_or(match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        _ => Ipv6Addr::UNSPECIFIED.into(),
    });
    let dst = IpNet::new(ip, message.header.destination_prefix_length).ok()?;
    let target = match message.header.kind {
        RouteType::Unicast => RouteTarget::Device { name: (*links.get(&oif?)?).to_owned(), src },
        RouteType::Throw => RouteTarget::Throw,
        RouteType::Unreachable => RouteTarget::Unreachable,
        _ => return None,
    };
    Some(Route { table, dst, target, metric })
}

fn address(value: &RouteAddress) -> Option<IpAddr> {
    match value {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn attribute(ip: IpAddr) -> RouteAddress {
    match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    }
}

/// The message that describes `route`; `index` is its device's.
pub(super) fn render(route: &Route, index: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = match route.dst {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    };
    message.header.destination_prefix_length = route.dst.prefix_len();
    message.header.protocol = PROTOCOL;
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Destination(attribute(route.dst.network())));
    attributes.push(RouteAttribute::Table(route.table));
    attributes.push(RouteAttribute::Priority(route.metric));
    match &route.target {
        RouteTarget::Device { src, .. } => {
            message.header.kind = RouteType::Unicast;
            // IPv6 knows only one scope for routes.
            message.header.scope = match route.dst {
                IpNet::V4(_) => RouteScope::Link,
                IpNet::V6(_) => RouteScope::Universe,
            };
            attributes.extend(index.map(RouteAttribute::Oif));
            let src = src.filter(|src| same_family(&route.dst, src));
            attributes.extend(src.map(|src| RouteAttribute::PrefSource(attribute(src))));
        }
        RouteTarget::Throw => {
            message.header.kind = RouteType::Throw;
            message.header.scope = RouteScope::Universe;
        }
        RouteTarget::Unreachable => {
            message.header.kind = RouteType::Unreachable;
            message.header.scope = RouteScope::Universe;
        }
    }
    message
}

/// The same, for a removal: of any scope, as `ip route del` asks.
pub(super) fn for_removal(mut message: RouteMessage) -> RouteMessage {
    message.header.scope = RouteScope::NoWhere;
    message
}
