//! What the shipped roles allow, asked of the API server itself.

use netns_tests::wait;
use serde_json::json;

use crate::support::{Caller, NAMESPACE, PATIENCE, install, with_cluster};

/// (verb, group, resource, subresource)
type Right = (&'static str, &'static str, &'static str, &'static str);

const ALLOWED: [Right; 30] = [
    ("list", "", "nodes", ""),
    ("watch", "", "nodes", ""),
    ("list", "", "pods", ""),
    ("watch", "", "pods", ""),
    ("list", "", "namespaces", ""),
    ("watch", "", "namespaces", ""),
    ("list", "networking.k8s.io", "networkpolicies", ""),
    ("watch", "networking.k8s.io", "networkpolicies", ""),
    ("list", "", "services", ""),
    ("watch", "", "services", ""),
    ("list", "margay.io", "meshconfigurations", ""),
    ("watch", "margay.io", "meshconfigurations", ""),
    ("list", "margay.io", "ippools", ""),
    ("watch", "margay.io", "ippools", ""),
    ("list", "margay.io", "ipreservations", ""),
    ("watch", "margay.io", "ipreservations", ""),
    ("list", "margay.io", "ipblocks", ""),
    ("watch", "margay.io", "ipblocks", ""),
    ("get", "margay.io", "ipblocks", ""),
    ("create", "margay.io", "ipblocks", ""),
    ("update", "margay.io", "ipblocks", ""),
    ("delete", "margay.io", "ipblocks", ""),
    ("patch", "", "nodes", ""),
    ("patch", "", "nodes", "status"),
    ("create", "margay.io", "meshnodestatuses", ""),
    ("patch", "margay.io", "meshnodestatuses", ""),
    ("patch", "margay.io", "meshnodestatuses", "status"),
    ("create", "events.k8s.io", "events", ""),
    ("patch", "events.k8s.io", "events", ""),
    // Everybody's.
    ("create", "authorization.k8s.io", "selfsubjectaccessreviews", ""),
];

#[test]
fn the_agent_may_do_what_it_does_and_nothing_else_and_the_datapath_nothing() {
    with_cluster(|cluster| {
        install(cluster, &["a"]);
        let ask = |caller: &Caller, (verb, group, resource, subresource): Right| {
            let review = json!({
                "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": {
                    "verb": verb, "group": group, "resource": resource, "subresource": subresource,
                    "namespace": if resource == "secrets" { NAMESPACE } else { "" },
                }},
            });
            let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
            let answer = caller.ask("POST", path, "application/json", &review);
            let answer: serde_json::Value = serde_json::from_slice(&answer.good().unwrap()).unwrap();
            answer["status"]["allowed"].as_bool().unwrap()
        };
        let agent = Caller::account(cluster, "agent", (NAMESPACE, "mesh-agent"), Some("mesh-agent-a"));
        let datapath = Caller::account(cluster, "datapath", (NAMESPACE, "mesh-datapath"), None);
        wait::until("the role to count", PATIENCE, || Ok(ask(&agent, ALLOWED[0]).then_some(()))).unwrap();
        let resources = [
            ("", "nodes", ["", "status", "proxy"].as_slice()),
            ("", "pods", &["", "status", "exec", "log", "ephemeralcontainers"]),
            ("", "namespaces", &["", "status"]),
            ("", "secrets", &[""]),
            ("", "configmaps", &[""]),
            ("", "services", &[""]),
            ("", "serviceaccounts", &["", "token"]),
            ("", "events", &[""]),
            ("events.k8s.io", "events", &[""]),
            ("networking.k8s.io", "networkpolicies", &[""]),
            ("margay.io", "meshconfigurations", &["", "status"]),
            ("margay.io", "ippools", &[""]),
            ("margay.io", "ipreservations", &[""]),
            ("margay.io", "ipblocks", &["", "status"]),
            ("margay.io", "meshnodestatuses", &["", "status"]),
            ("apps", "daemonsets", &[""]),
            ("rbac.authorization.k8s.io", "clusterroles", &[""]),
            ("admissionregistration.k8s.io", "validatingadmissionpolicies", &[""]),
            ("apiextensions.k8s.io", "customresourcedefinitions", &[""]),
        ];
        let verbs = [
            "get",
            "list",
            "watch",
            "create",
            "update",
            "patch",
            "delete",
            "deletecollection",
            "announce",
            "impersonate",
            "bind",
            "escalate",
            "*",
        ];
        for (group, resource, subresources) in resources {
            for (subresource, verb) in
                subresources.iter().flat_map(|s| verbs.iter().map(move |verb| (*s, *verb)))
            {
                let right = (verb, group, resource, subresource);
                assert_eq!(ask(&agent, right), ALLOWED.contains(&right), "agent: {right:?}");
                assert!(!ask(&datapath, right), "datapath: {right:?}");
            }
        }
        for (caller, right) in ALLOWED.iter().map(|right| (&agent, *right)) {
            assert!(ask(caller, right), "{right:?}");
        }
    });
}
