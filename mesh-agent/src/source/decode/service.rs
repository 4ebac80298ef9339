//! Service: the addresses from which kube-proxy sends packets on to pods.

use ebpf_policy::model::Protocol;
use k8s_openapi::api::core::v1;

use super::problem::Problems;
use super::{cidr, meta};
use crate::snapshot::Service;

/// `spec.clusterIP` of a Service that has none.
const HEADLESS: &str = "None";

/// Converts a Service.
pub fn decode(service: &v1::Service, problems: &mut Problems) -> Service {
    meta::check(&service.metadata, problems);
    let mut out = Service::default();
    let Some(spec) = &service.spec else { return out };
    let cluster = spec.cluster_ips.iter().flatten().enumerate();
    let mut texts: Vec<(String, &str)> =
        cluster.map(|(index, text)| (format!("spec.clusterIPs[{index}]"), text.as_str())).collect();
    if texts.is_empty() {
        texts.extend(spec.cluster_ip.as_deref().map(|text| ("spec.clusterIP".to_owned(), text)));
    }
    let external = spec.external_ips.iter().flatten().enumerate();
    texts.extend(external.map(|(index, text)| (format!("spec.externalIPs[{index}]"), text.as_str())));
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|balancer| balancer.ingress.as_ref()).into_iter().flatten().enumerate();
    texts.extend(ingress.filter_map(|(index, ingress)| {
        Some((format!("status.loadBalancer.ingress[{index}].ip"), ingress.ip.as_deref()?))
    }));
    for (field, text) in texts.into_iter().filter(|(_, text)| !text.is_empty() && *text != HEADLESS) {
        match cidr::address(text) {
            Ok(ip) => {
                out.addresses.insert(ip);
            }
            Err(message) => problems.invalid(field, message),
        }
    }
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        let field = format!("spec.ports[{index}]");
        let protocol = match port.protocol.as_deref() {
            None | Some("" | "TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            Some(other) => {
                let message = format!("{other:?} is none of TCP, UDP, SCTP");
                problems.invalid(format!("{field}.protocol"), message);
                continue;
            }
        };
        let Some(number) = port.node_port.filter(|number| *number != 0) else { continue };
        match u16::try_from(number) {
            Ok(number) => {
                out.node_ports.insert((protocol, number));
            }
            Err(_) => problems.invalid(format!("{field}.nodePort"), format!("{number} is not in 1-65535")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn decoded(text: &str) -> (Service, Problems) {
        let mut problems = Problems::default();
        let service = decode(&serde_saphyr::from_str(text).unwrap(), &mut problems);
        (service, problems)
    }

    #[test]
    fn every_address_and_node_port_counts() {
        let (service, problems) = decoded(
            "spec:\n  clusterIP: 10.96.0.1\n  clusterIPs: [10.96.0.1, 'fd00::1']\n  externalIPs: [192.0.2.1]\n  \
             ports: [{port: 80, nodePort: 30080}, {port: 53, protocol: UDP, nodePort: 30053}, {port: 1}]\n\
             status: {loadBalancer: {ingress: [{ip: 192.0.2.2}, {hostname: a.example}]}}",
        );
        assert!(problems.0.is_empty(), "{problems:?}");
        let texts: Vec<_> = service.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.96.0.1", "192.0.2.1", "192.0.2.2", "fd00::1"]);
        assert_eq!(service.node_ports, [(Protocol::Tcp, 30080), (Protocol::Udp, 30053)].into());
    }

    #[test]
    fn a_headless_service_has_no_address_and_a_bad_one_says_where() {
        assert_eq!(decoded("spec: {clusterIP: None, clusterIPs: [None]}").0, Service::default());
        let (_, problems) =
            decoded("spec: {externalIPs: [x], ports: [{port: 1, protocol: X}, {port: 1, nodePort: 70000}]}");
        let fields: Vec<_> = problems.0.iter().map(|problem| problem.field.as_str()).collect();
        assert_eq!(fields, ["spec.externalIPs[0]", "spec.ports[0].protocol", "spec.ports[1].nodePort"]);
    }
}
