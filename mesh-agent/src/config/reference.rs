//! The custom resources' definitions and the configuration reference, made from the types so that they
//! cannot say anything else. A test holds the committed files against them.

use std::fmt::Write as _;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use super::AgentConfig;
use super::mesh::{MeshConfiguration, MeshConfigurationSpec};
use super::node_status::MeshNodeStatus;

/// The custom resources' definitions, by their file's name below `manifests/crds/`.
pub fn crds() -> Result<Vec<(String, String)>, serde_saphyr::SerializeError> {
    let all = [MeshConfiguration::crd(), MeshNodeStatus::crd()];
    let file = |crd: &CustomResourceDefinition| {
        let name = format!("{}_{}.yaml", crd.spec.group, crd.spec.names.plural);
        Ok((name, format!("# Generated from the Rust types.\n{}", serde_saphyr::to_string(crd)?)))
    };
    all.iter().map(file).collect()
}

/// `docs/configuration.md`.
pub fn configuration_md() -> String {
    let mut out = String::from(INTRODUCTION);
    table::<AgentConfig>(&mut out);
    out.push_str(MESH);
    table::<MeshConfigurationSpec>(&mut out);
    out.push_str(MANIFESTS);
    out
}

const INTRODUCTION: &str = "\
# Configuration

The tables are generated from the code; a test fails when they differ from it.

## One host: `/etc/margay/agent.yaml`

What differs between hosts. Without the file everything has its default. An unknown field, a wrong type or an
impossible value ends the start with the file, the line and the field.

";

const MESH: &str = "
## The whole mesh: `MeshConfiguration`

A cluster-scoped object of `margay.io/v1alpha1`, of which there is one, named `default`. Fields of its `spec`:

";

const MANIFESTS: &str = "
An unknown field or an impossible value refuses the object: the version accepted before stays in force, and
`meshctl status` names the field. Without any accepted version there are no pools, so the node has no part in
the mesh.

## The manifest directory

Every `*.yaml`, `*.yml` and `*.json` below the directory is read, and again whenever it changes. Names that
begin with a dot are not read themselves, but links may lead to them, so a mounted ConfigMap works. A file may
hold several YAML documents, and lists (`kind: List`, `NodeList` …). Read are `Node`, `Namespace`, `Pod`,
`NetworkPolicy` and `MeshConfiguration`; of any other kind nothing but its name is looked at.

Objects mean what they mean in a cluster, with the API server's defaults (namespace `default`, `policyTypes`,
protocol TCP, the label `kubernetes.io/metadata.name`) and its checks of the fields the mesh uses. A pod's
containers need not be listed.

| what is wrong | what happens |
| --- | --- |
| a field nobody knows | a warning; the object counts (a `MeshConfiguration` is refused) |
| an invalid Node, Namespace, Pod or MeshConfiguration | refused; the version accepted before stays in force |
| an invalid NetworkPolicy | it fails closed: a rule that cannot be read allows nothing, and if the selector or the policy types cannot be read, all of the namespace is isolated |
| a document or file that cannot be read | the objects it held before stay in force, other documents count |
| an empty file | the objects it held before stay in force; delete the file to delete them |
| the directory cannot be read | everything read before stays in force; before the first reading nothing is removed from the host |
| one object in two files | the first in the order of paths counts |
| a file above 8 MiB, more than 100,000 files | not read |

Each of these is an issue in `meshctl status`, with file, object and field.

`nodes/NAME.margay.yaml` belongs to the agent of node NAME. Of it only the announcement counts: the annotations
below. They are merged with the Node of that name, which the operator writes and which alone decides prefixes,
addresses and labels.

| annotation | written by | meaning |
| --- | --- | --- |
| `margay.io/announcement-version` | agent | version of the announcement |
| `margay.io/keys` | agent | public keys, each with its UDP port and epoch |
| `margay.io/endpoints` | agent | where it can be reached; only addresses in `status.addresses` count, if there are any |
| `margay.io/capabilities` | agent | what it can do |
| `margay.io/pod-cidrs` | agent | prefixes it would like; they count only where `spec.podCIDRs` names none |
| `margay.io/endpoint-override` | operator | `address:port`, or an address, at which peers reach the node instead |
";

fn table<T: JsonSchema>(out: &mut String) {
    let schema = SchemaSettings::default()
        .with(|s| s.inline_subschemas = true)
        .into_generator()
        .into_root_schema_for::<T>();
    out.push_str("| field | type | default | meaning |\n| --- | --- | --- | --- |\n");
    rows(schema.as_value(), "", out);
}

fn rows(schema: &Value, path: &str, out: &mut String) {
    let empty = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&empty);
    let required = schema.get("required").and_then(Value::as_array);
    for (name, property) in properties {
        let field = format!("{path}{name}");
        let needed = required.is_some_and(|list| list.iter().any(|entry| entry == name));
        let default = match property.get("default") {
            _ if needed => "required".to_owned(),
            None if property.get("items").is_some() => "none".to_owned(),
            None | Some(Value::Null) => "–".to_owned(),
            Some(Value::String(text)) if text.is_empty() => "–".to_owned(),
            Some(Value::Array(list)) if list.is_empty() => "none".to_owned(),
            Some(Value::Object(_)) => "see below".to_owned(),
            Some(Value::String(text)) => format!("`{text}`"),
            Some(other) => format!("`{other}`"),
        };
        let meaning = property.get("description").and_then(Value::as_str).unwrap_or_default();
        let meaning = meaning.split_whitespace().collect::<Vec<_>>().join(" ");
        // Writing to a String cannot fail.
        let _ = writeln!(out, "| `{field}` | {} | {default} | {meaning} |", type_of(name, property));
        if name == "nodeSelector" {
            continue;
        }
        rows(property, &format!("{field}."), out);
        if let Some(nested) = variants(property).find(|variant| variant.get("properties").is_some()) {
            rows(nested, &format!("{field}."), out);
        }
        if let Some(items) = property.get("items") {
            rows(items, &format!("{field}[]."), out);
        }
    }
}

fn variants(schema: &Value) -> impl Iterator<Item = &Value> {
    ["oneOf", "anyOf"].into_iter().filter_map(|key| schema.get(key)?.as_array()).flatten()
}

fn type_of(name: &str, schema: &Value) -> String {
    if name == "nodeSelector" {
        return "label selector".into();
    }
    let constants: Vec<String> = variants(schema)
        .chain([schema])
        .flat_map(|variant| {
            let listed = variant.get("enum").and_then(Value::as_array).into_iter().flatten();
            listed.chain(variant.get("const")).filter_map(Value::as_str)
        })
        .map(|text| format!("`{text}`"))
        .collect();
    if !constants.is_empty() {
        return constants.join(", ");
    }
    let known = |text: &str| match text {
        "integer" => {
            let bound = |key: &str| schema.get(key).and_then(Value::as_u64);
            match (bound("minimum"), bound("maximum")) {
                (Some(least), Some(most)) => format!("number {least}–{most}"),
                _ => "number".to_owned(),
            }
        }
        "array" => {
            let items = schema.get("items").map(|items| type_of("", items)).unwrap_or_default();
            format!("list of {items}")
        }
        "string" => match schema.get("format").and_then(Value::as_str) {
            Some("cidr") => "prefix".to_owned(),
            Some("duration") => "duration".to_owned(),
            _ => "string".to_owned(),
        },
        "boolean" => "true or false".to_owned(),
        other => other.to_owned(),
    };
    match schema.get("type") {
        Some(Value::String(text)) => known(text),
        Some(Value::Array(list)) => list
            .iter()
            .filter_map(Value::as_str)
            .filter(|t| *t != "null")
            .map(known)
            .collect::<Vec<_>>()
            .join(" or "),
        _ => "object".into(),
    }
}
