"""The code cells of SGLang's page "OpenAI APIs - Vision" (Apache-2.0), which this project set out to serve.

Changed: the package's name (sglang to sightline), MODEL for the model's name, and EXAMPLE and LOGO for the two pictures' URLs.
"""

CELLS = [
    r'''
from sightline.test.test_utils import is_in_ci

if is_in_ci():
    from patch import launch_server_cmd
else:
    from sightline.utils import launch_server_cmd

from sightline.utils import wait_for_server, print_highlight, terminate_process

vision_process, port = launch_server_cmd(
    """
python3 -m sightline.launch_server --model-path MODEL \
    --chat-template=llama_3_vision
"""
)

wait_for_server(f"http://localhost:{port}")
''',
    r'''
import subprocess

curl_command = f"""
curl -s http://localhost:{port}/v1/chat/completions \\
  -d '{{
    "model": "MODEL",
    "messages": [
      {{
        "role": "user",
        "content": [
          {{
            "type": "text",
            "text": "What’s in this image?"
          }},
          {{
            "type": "image_url",
            "image_url": {{
              "url": "EXAMPLE"
            }}
          }}
        ]
      }}
    ],
    "max_tokens": 300
  }}'
"""

response = subprocess.check_output(curl_command, shell=True).decode()
print_highlight(response)

response = subprocess.check_output(curl_command, shell=True).decode()
print_highlight(response)
''',
    r"""
import requests

url = f"http://localhost:{port}/v1/chat/completions"

data = {
    "model": "MODEL",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What’s in this image?"},
                {
                    "type": "image_url",
                    "image_url": {
                        "url": "EXAMPLE"
                    },
                },
            ],
        }
    ],
    "max_tokens": 300,
}

response = requests.post(url, json=data)
print_highlight(response.text)
""",
    r"""
from openai import OpenAI

client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="None")

response = client.chat.completions.create(
    model="MODEL",
    messages=[
        {
            "role": "user",
            "content": [
                {
                    "type": "text",
                    "text": "What is in this image?",
                },
                {
                    "type": "image_url",
                    "image_url": {
                        "url": "EXAMPLE"
                    },
                },
            ],
        }
    ],
    max_tokens=300,
)

print_highlight(response.choices[0].message.content)
""",
    r"""
from openai import OpenAI

client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="None")

response = client.chat.completions.create(
    model="MODEL",
    messages=[
        {
            "role": "user",
            "content": [
                {
                    "type": "image_url",
                    "image_url": {
                        "url": "EXAMPLE",
                    },
                },
                {
                    "type": "image_url",
                    "image_url": {
                        "url": "LOGO",
                    },
                },
                {
                    "type": "text",
                    "text": "I have two very different images. They are not related at all. "
                    "Please describe the first image in one sentence, and then describe the second image in another sentence.",
                },
            ],
        }
    ],
    temperature=0,
)

print_highlight(response.choices[0].message.content)
""",
    r"""
terminate_process(vision_process)
""",
]
