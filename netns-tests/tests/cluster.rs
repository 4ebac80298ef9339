//! The API server that scenarios talk to: it is the real one, and goes with its host.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod common;

use std::time::Duration;

use common::{bins, nodes};
use mesh_api::defaults::{CONFIG, MANIFESTS};
use netns_tests::cluster::{ADMIN_CONFIG, Cluster};
use netns_tests::host::Host;
use netns_tests::lab::Lab;
use netns_tests::leaks::{self, Machine};
use netns_tests::manifests::{self, PodStatus};
use netns_tests::spec::API_SERVER;
use netns_tests::wait;
use netns_tests::wire::Wire;
use netns_tests::wire::impair::{Conditions, Links};
use serde_json::{Value, json};

/// An API server's host, another one, and the wire between them.
struct Two {
    server: Host,
    other: Host,
    wire: Wire,
}

fn two() -> Two {
    let bins = bins();
    let mut wire = Wire::start(&bins, Links::new(Conditions::default())).unwrap();
    let mut host = |name: &str, own: &[&str], others: &[&str]| {
        let host = Host::start(name, &bins).unwrap();
        wire.plug(name, &host, "eth0").unwrap();
        let parsed = |list: &[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<_>>();
        host.netns().ip(&Wire::addressing("eth0", &parsed(own), &parsed(others), true)).unwrap();
        host
    };
    let server = host("apiserver", &SERVER, &OTHER);
    let other = host("other", &OTHER, &SERVER);
    Two { server, other, wire }
}

const SERVER: [&str; 2] = ["192.0.2.100", "2001:db8::100"];
const OTHER: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

fn start(host: &Host) -> Cluster<'_> {
    let addresses = SERVER.map(|ip| ip.parse().unwrap());
    let cluster = Cluster::start(host, &addresses).unwrap();
    cluster.apply(OBJECTS).unwrap();
    cluster
}

const OBJECTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: d}
---
apiVersion: v1
kind: ServiceAccount
metadata: {namespace: d, name: agent}
---
apiVersion: v1
kind: Node
metadata: {name: a}
spec: {podCIDRs: [10.244.1.0/24]}
---
apiVersion: v1
kind: Pod
metadata: {namespace: d, name: p, labels: {app: web}}
spec:
  nodeName: a
  serviceAccountName: agent
  containers: [{name: main, image: lab}]
";

/// What a watch of all pods from that version hears in a second.
fn watch(cluster: &Cluster<'_>, version: &str) -> Vec<Value> {
    let path = format!("/api/v1/pods?watch=1&resourceVersion={version}&timeoutSeconds=1");
    cluster.client().watch(&path).unwrap()
}

#[test]
fn an_api_server_serves_the_lab_and_remembers() {
    let two = two();
    let cluster = start(&two.server);

    // From another host over the wire, both families, by the certificate's names.
    cluster.admit(&two.other).unwrap();
    let kubectl = |arguments: &[&str]| two.other.run(&[&["kubectl"], arguments].concat());
    assert_eq!(kubectl(&["get", "nodes", "-o", "name"]).unwrap(), "node/a\n");
    for address in SERVER {
        let server =
            format!("--server=https://{}", std::net::SocketAddr::new(address.parse().unwrap(), 6443));
        assert_eq!(kubectl(&["get", "--raw=/readyz", &server]).unwrap(), "ok");
    }
    kubectl(&["create", "configmap", "c", "-n", "d", "--from-literal=k=v"]).unwrap();
    assert_eq!(cluster.get("configmap", Some("d"), "c").unwrap()["data"]["k"], "v");
    let mode = std::fs::metadata(two.other.path(ADMIN_CONFIG)).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o600);

    // Objects and their status, by kubectl and by plain HTTP.
    cluster.patch("node", None, "a", &json!({"metadata": {"labels": {"x": "1"}}})).unwrap();
    let addresses = json!([{"type": "InternalIP", "address": "192.0.2.1"}]);
    cluster.set_status("node", None, "a", &json!({"addresses": addresses})).unwrap();
    let node = cluster.get("node", None, "a").unwrap();
    assert_eq!((&node["metadata"]["labels"]["x"], &node["status"]["addresses"]), (&json!("1"), &addresses));
    let client = cluster.client();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "d", "name": "q"},
        "spec": {"nodeName": "a", "containers": [{"name": "main", "image": "lab"}]},
        "status": {"phase": "Running", "podIP": "10.244.1.7", "podIPs": [{"ip": "10.244.1.7"}]},
    });
    client.apply(&pod).unwrap();
    assert_eq!(cluster.get("pod", Some("d"), "q").unwrap()["status"]["podIPs"], pod["status"]["podIPs"]);
    for _ in 0..2 {
        client.delete(&pod).unwrap();
    }
    assert!(cluster.get("pod", Some("d"), "q").unwrap_err().to_string().contains("not found"));

    // What the mesh's manifests need of it.
    let kustomize = "resources: [map.yaml]\nnamePrefix: x-\nnamespace: d\n";
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: k}\n";
    two.server.write("/run/k/kustomization.yaml", kustomize.as_bytes()).unwrap();
    two.server.write("/run/k/map.yaml", map.as_bytes()).unwrap();
    cluster.kubectl(&["apply", "--server-side", "-k", "/run/k"]).unwrap();
    cluster.get("configmap", Some("d"), "x-k").unwrap();

    // Stopped and started: the same cluster.
    let uid = node["metadata"]["uid"].clone();
    let before = cluster.get("pod", Some("d"), "p").unwrap();
    cluster.stop().unwrap();
    assert!(cluster.ready().is_err());
    assert!(kubectl(&["get", "nodes", "--request-timeout=2s"]).is_err());
    cluster.resume().unwrap();
    assert_eq!(cluster.get("node", None, "a").unwrap()["metadata"]["uid"], uid);

    // A watcher resumes, until the past is gone.
    let version = before["metadata"]["resourceVersion"].as_str().unwrap();
    cluster.patch("pod", Some("d"), "p", &json!({"metadata": {"labels": {"app": "new"}}})).unwrap();
    cluster.restart_compacted().unwrap();
    let events = watch(&cluster, version);
    assert_eq!(
        (&events[0]["type"], &events[0]["object"]["code"]),
        (&json!("ERROR"), &json!(410)),
        "{events:?}"
    );
    let now = cluster.get("pod", Some("d"), "p").unwrap();
    assert_eq!(now["metadata"]["labels"]["app"], "new");
    let events = watch(&cluster, now["metadata"]["resourceVersion"].as_str().unwrap());
    assert!(events.iter().all(|event| event["type"] != "ERROR"), "{events:?}");
    drop(two.wire);
}

#[test]
fn a_token_says_on_which_node_its_pod_is() {
    let two = two();
    let cluster = start(&two.server);
    let who = |pod: Option<&str>| {
        let token = cluster.token("d", "agent", pod).unwrap();
        cluster.kubeconfig_for(&token, &two.other, "/etc/margay/kubeconfig").unwrap();
        let argv = ["kubectl", "--kubeconfig=/etc/margay/kubeconfig", "auth", "whoami", "-o", "json"];
        let said: Value = serde_json::from_str(&two.other.run(&argv).unwrap()).unwrap();
        said["status"]["userInfo"].clone()
    };
    let bound = who(Some("p"));
    assert_eq!(bound["username"], "system:serviceaccount:d:agent");
    assert_eq!(bound["extra"]["authentication.kubernetes.io/node-name"], json!(["a"]), "{bound}");
    assert_eq!(bound["extra"]["authentication.kubernetes.io/pod-name"], json!(["p"]), "{bound}");
    let free = who(None);
    assert_eq!(free["username"], bound["username"]);
    assert!(free["extra"]["authentication.kubernetes.io/node-name"].is_null(), "{free}");

    // RBAC is on: the account may do nothing that nobody allowed.
    let get = ["kubectl", "--kubeconfig=/etc/margay/kubeconfig", "get", "nodes"];
    assert!(two.other.run(&get).unwrap_err().to_string().contains("forbidden"));
    let binding =
        ["create", "clusterrolebinding", "b", "--clusterrole=system:node", "--serviceaccount=d:agent"];
    cluster.kubectl(&binding).unwrap();
    wait::until("the binding to count", Duration::from_secs(10), || two.other.run(&get).map(Some)).unwrap();

    // So is the admission of policies.
    let policy = r#"
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: no-nodes}
spec:
  failurePolicy: Fail
  matchConstraints: {resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [UPDATE], resources: [nodes]}]}
  validations: [{expression: "false", message: nobody changes nodes}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: no-nodes}
spec: {policyName: no-nodes, validationActions: [Deny]}
"#;
    cluster.apply(policy).unwrap();
    let patched = wait::until("the policy to count", Duration::from_secs(20), || {
        let label = json!({"metadata": {"labels": {"n": rand::random::<u16>().to_string()}}});
        Ok(cluster.patch("node", None, "a", &label).err())
    });
    assert!(patched.unwrap().to_string().contains("nobody changes nodes"));
}

#[test]
fn a_lab_with_an_api_server_has_its_objects_there() {
    let more = format!("apiServer: {{ips: ['{}']}}\n", SERVER.join("', '"));
    let mut lab = Lab::plug(nodes("ab", &more), &bins()).unwrap();
    lab.address().unwrap();
    lab.write_cluster().unwrap();
    let names = lab.cluster().unwrap().kubectl(&["get", "nodes,namespaces,meshconfigurations", "-o", "name"]);
    let names = names.unwrap();
    for name in ["node/a", "node/b", "namespace/d", "meshconfiguration.margay.io/default"] {
        assert!(names.lines().any(|line| line == name), "no {name} in {names}");
    }
    let node = lab.cluster().unwrap().get("node", None, "b").unwrap();
    assert_eq!(node["spec"]["podCIDRs"], json!(["10.244.2.0/24", "fd00:10:244:2::/64"]));
    assert_eq!(node["status"]["addresses"][1]["address"], "2001:db8::2");

    // Two addresses of one type are no obstacle to those who apply something else.
    let annotation = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "b", "annotations": {"example.com/x": "1"}},
    });
    let argv = ["kubectl", "apply", "--server-side", "--field-manager=other", "-f", "-"];
    lab.host(API_SERVER).unwrap().run_with(&argv, annotation.to_string().as_bytes()).unwrap();
    let node = lab.cluster().unwrap().get("node", None, "b").unwrap();
    assert_eq!(node["metadata"]["annotations"]["example.com/x"], "1");
    assert_eq!(node["status"]["addresses"].as_array().unwrap().len(), 2);

    // A node knows itself and the cluster, and no object by file.
    for name in lab.node_names() {
        lab.write_node(&name).unwrap();
        let host = lab.host(&name).unwrap();
        let config = std::fs::read_to_string(host.path(CONFIG)).unwrap();
        assert!(config.contains("kubernetes:") && !host.path(MANIFESTS).exists(), "{config}");
        let argv = ["kubectl", "--kubeconfig=/etc/margay/kubeconfig", "auth", "whoami", "-o", "json"];
        let said: Value = serde_json::from_str(&host.run(&argv).unwrap()).unwrap();
        let user = &said["status"]["userInfo"];
        assert_eq!(user["username"], "system:serviceaccount:margay-system:mesh-agent");
        assert_eq!(user["extra"]["authentication.kubernetes.io/node-name"], json!([name]));
    }

    // What a scenario writes and deletes.
    let policy = manifests::policy("d", "closed", json!({"podSelector": {}}));
    lab.put(policy.clone()).unwrap();
    lab.cluster().unwrap().get("networkpolicy", Some("d"), "closed").unwrap();
    lab.delete(&policy).unwrap();
    assert!(lab.cluster().unwrap().get("networkpolicy", Some("d"), "closed").is_err());
    let spec = lab.spec().pods[0].clone();
    lab.put(manifests::pod(&spec, &PodStatus::default())).unwrap();
    let ips = ["10.244.1.9", "fd00:10:244:1::9"].map(|ip| ip.parse().unwrap());
    lab.put(manifests::pod(&spec, &PodStatus { ips: ips.into(), ..Default::default() })).unwrap();
    let pod = lab.cluster().unwrap().get("pod", Some("d"), "pa").unwrap();
    assert_eq!((&pod["status"]["phase"], &pod["status"]["podIP"]), (&json!("Running"), &json!(ips[0])));
    assert_eq!(pod["status"]["podIPs"], json!([{"ip": ips[0]}, {"ip": ips[1]}]));
    let time = Some("2026-01-01T00:00:00Z".into());
    let status = PodStatus { ips: ips.into(), deletion_timestamp: time, ..Default::default() };
    lab.put(manifests::pod(&spec, &status)).unwrap();
    let pod = lab.cluster().unwrap().get("pod", Some("d"), "pa").unwrap();
    assert!(pod["metadata"]["deletionTimestamp"].is_string(), "{pod}");
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "gone"}});
    lab.put(namespace.clone()).unwrap();
    lab.delete(&namespace).unwrap();
    assert!(lab.cluster().unwrap().get("namespace", None, "gone").is_err());

    // The API server's host loses its power, not its disk.
    lab.kill_host(API_SERVER).unwrap();
    assert!(lab.cluster().unwrap().ready().is_err());
    lab.boot_host(API_SERVER).unwrap();
    let again = lab.cluster().unwrap().get("node", None, "b").unwrap();
    assert_eq!(again["metadata"]["uid"], node["metadata"]["uid"]);
    lab.host("a")
        .unwrap()
        .run(&["kubectl", "--kubeconfig=/etc/margay/kubeconfig", "auth", "whoami"])
        .unwrap();
}

#[test]
fn nothing_of_it_is_left() {
    let before = Machine::look().unwrap();
    let two = two();
    let (run, namespaces) = (two.server.bins().run.clone(), [two.server.netns().inode().unwrap()]);
    start(&two.server);
    let running = leaks::left(&run, &namespaces).unwrap();
    for program in ["etcd", "kube-apiserver", "kubectl"] {
        assert!(running.iter().any(|line| line.contains(program)), "{running:?}");
    }
    drop(two);
    wait::until("all to be gone", Duration::from_secs(10), || {
        let mut left = leaks::left(&run, &namespaces)?;
        left.extend(before.difference(&Machine::look()?));
        anyhow::ensure!(left.is_empty(), "{left:?}");
        Ok(Some(()))
    })
    .unwrap();
}
