{{/* The name of everything in this release, before a component's own; a pod's name on the bus has 64 characters. */}}
{{- define "kvferry.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 36 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 36 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* The services of this release. */}}
{{- define "kvferry.roles" -}}
{{- $roles := list "prefill" "decode" }}{{ if .Values.gateway.enabled }}{{ $roles = prepend $roles "gateway" }}{{ end }}
{{- toYaml $roles }}
{{- end }}

{{/* Labels that select one component's pods. (dict "root" $ "role" "prefill") */}}
{{- define "kvferry.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end }}

{{- define "kvferry.labels" -}}
{{ include "kvferry.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* One service's scaling.yaml with the values laid over it, as YAML. */}}
{{- define "kvferry.scaling" -}}
{{- $file := .root.Files.Get (printf "scaling/%s.yaml" .role) | required (printf "the chart lacks scaling/%s.yaml" .role) | fromYaml -}}
{{- if hasKey $file "Error" }}{{ fail (printf "scaling/%s.yaml: %s" .role $file.Error) }}{{ end -}}
{{- mergeOverwrite $file (deepCopy (index .root.Values .role).scaling) | toYaml }}
{{- end }}

{{- define "kvferry.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ . }}/{{ end }}kvferry/{{ .role }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- with (index .root.Values .role).imageSuffix }}{{ . }}{{ end }}
{{- end }}

{{- define "kvferry.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "kvferry.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* What a service is told, the operator's own settings last. Secrets are named as files. */}}
{{- define "kvferry.environment" -}}
{{- $values := .root.Values -}}
{{- $own := index $values .role -}}
{{- $secrets := "/run/secrets/kvferry" -}}
{{- $env := dict
  "KVFERRY_CLUSTER" $values.cluster
  "KVFERRY_MODEL" (printf "%s=/models/served" $values.model.servedName)
  "KVFERRY_SCALING_FILE" "/etc/kvferry/scaling.yaml"
  "KVFERRY_NATS_URL" (join "," $values.nats.urls)
  "KVFERRY_LOG_LEVEL" $values.logLevel
  "KVFERRY_LOG_FORMAT" "json" -}}
{{- if $values.secret.natsPassword -}}
{{- $_ := set $env "KVFERRY_NATS_USER" ($values.nats.user | default (printf "%s-%s" $values.cluster .role)) -}}
{{- $_ := set $env "KVFERRY_NATS_PASSWORD_FILE" (printf "%s/nats-password" $secrets) }}{{ end -}}
{{- if $values.secret.natsToken }}{{ $_ := set $env "KVFERRY_NATS_TOKEN_FILE" (printf "%s/nats-token" $secrets) }}{{ end -}}
{{- if $values.nats.tls.caSecret }}{{ $_ := set $env "KVFERRY_NATS_TLS_CA" "/run/secrets/nats-ca/ca.crt" }}{{ end -}}
{{- if $values.nats.tls.clientSecret -}}
{{- $_ := set $env "KVFERRY_NATS_TLS_CERT" "/run/secrets/nats-client/tls.crt" -}}
{{- $_ := set $env "KVFERRY_NATS_TLS_KEY" "/run/secrets/nats-client/tls.key" -}}
{{- end -}}
{{- if and (eq .role "gateway") $own.tls.secret -}}
{{- $_ := set $env "KVFERRY_TLS_CERT" "/run/secrets/https/tls.crt" -}}
{{- $_ := set $env "KVFERRY_TLS_KEY" "/run/secrets/https/tls.key" -}}
{{- end -}}
{{- with $values.tracing.otlpEndpoint }}{{ $_ := set $env "KVFERRY_OTLP_ENDPOINT" . }}{{ end -}}
{{- if eq .role "gateway" -}}
{{- if $values.tracing.otlpEndpoint }}{{ $_ := set $env "KVFERRY_TRACE_SAMPLE_RATIO" ($values.tracing.sampleRatio | toString) }}{{ end -}}
{{- range $at, $model := $own.otherModels }}{{ $_ := set $env "KVFERRY_MODEL" (printf "%s,%s=/models/other-%d" $env.KVFERRY_MODEL $model.name $at) }}{{ end -}}
{{- if $values.secret.apiKeys }}{{ $_ := set $env "KVFERRY_API_KEY_FILE" (printf "%s/api-keys" $secrets) }}{{ end -}}
{{- else -}}
{{- $_ := set $env "KVFERRY_DATA_KEY_FILE" (printf "%s/data-key" $secrets) -}}
{{- $_ := set $env "KVFERRY_MAX_MODEL_LEN" ($values.model.maxModelLen | int | toString) -}}
{{- $_ := set $env "KVFERRY_ADVERTISE_HOST" "auto" -}}
{{- /* its TCP transport; a worker without UCX must not start silently */ -}}
{{- $_ := set $env "KVFERRY_TRANSPORT" "ucx" -}}
{{- if $own.gpus }}{{ $_ := set $env "KVFERRY_DEVICE" "cuda" }}{{ end -}}
{{- end -}}
- {name: KVFERRY_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
{{- range $name, $value := mergeOverwrite $env $own.environment }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- define "kvferry.mounts" -}}
- {name: model, mountPath: /models/served, readOnly: true{{ with .root.Values.model.subPath }}, subPath: {{ . | quote }}{{ end }}}
{{- if eq .role "gateway" }}{{ range $at, $model := .root.Values.gateway.otherModels }}
- {name: other-{{ $at }}, mountPath: /models/other-{{ $at }}, readOnly: true{{ with $model.subPath }}, subPath: {{ . | quote }}{{ end }}}
{{- end }}{{ end }}
- {name: scaling, mountPath: /etc/kvferry, readOnly: true}
- {name: secret, mountPath: /run/secrets/kvferry, readOnly: true}
{{- if .root.Values.nats.tls.caSecret }}
- {name: nats-ca, mountPath: /run/secrets/nats-ca, readOnly: true}
{{- end }}
{{- if .root.Values.nats.tls.clientSecret }}
- {name: nats-client, mountPath: /run/secrets/nats-client, readOnly: true}
{{- end }}
{{- if and (eq .role "gateway") .root.Values.gateway.tls.secret }}
- {name: https, mountPath: /run/secrets/https, readOnly: true}
{{- end }}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{/* Of the Secret a pod sees only the keys that its role needs. */}}
{{- define "kvferry.volumes" -}}
{{- $secret := .root.Values.secret -}}
- name: model
  persistentVolumeClaim: {claimName: {{ .root.Values.model.claim | quote }}, readOnly: true}
{{- if eq .role "gateway" }}{{ range $at, $model := .root.Values.gateway.otherModels }}
- name: other-{{ $at }}
  persistentVolumeClaim: {claimName: {{ $model.claim | quote }}, readOnly: true}
{{- end }}{{ end }}
- name: scaling
  configMap: {name: {{ include "kvferry.fullname" .root }}-{{ .role }}-scaling}
- name: secret
  secret:
    secretName: {{ $secret.name | quote }}
    defaultMode: 0440
    items:
      {{- if ne .role "gateway" }}
      - {key: data-key, path: data-key}
      {{- end }}
      {{- if $secret.natsPassword }}
      - {key: nats-password{{ if not .root.Values.nats.user }}-{{ .role }}{{ end }}, path: nats-password}
      {{- end }}
      {{- if $secret.natsToken }}
      - {key: nats-token, path: nats-token}
      {{- end }}
      {{- if and $secret.apiKeys (eq .role "gateway") }}
      - {key: api-keys, path: api-keys}
      {{- end }}
{{- with .root.Values.nats.tls.caSecret }}
- name: nats-ca
  secret: {secretName: {{ . | quote }}, defaultMode: 0444, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- with .root.Values.nats.tls.clientSecret }}
- name: nats-client
  secret: {secretName: {{ . | quote }}, defaultMode: 0440}
{{- end }}
{{- if eq .role "gateway" }}
{{- with .root.Values.gateway.tls.secret }}
- name: https
  secret: {secretName: {{ . | quote }}, defaultMode: 0440}
{{- end }}
{{- end }}
- name: tmp
  emptyDir: {medium: Memory, sizeLimit: 64Mi}
{{- end }}

{{/* Where the pods go, the same form for all. */}}
{{- define "kvferry.scheduling" -}}
{{- $own := index .root.Values .role -}}
{{- with $own.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "kvferry.selector" . | nindent 8 }}
{{- end }}
